"""Files that an evaluation writes: its numbers as json, its curves and its first images as pictures."""

import warnings
from pathlib import Path

import numpy as np

from detr_fast.config import UserError
from detr_fast.data.coco import CocoDataset, ImageRecord
from detr_fast.data.decode import decode_image
from detr_fast.evaluation.coco_metrics import Evaluation, category_names
from detr_fast.evaluation.fonts import class_names
from detr_fast.evaluation.inference import CATEGORY_ID, HEIGHT, IMAGE_ID, SCORE, X
from detr_fast.evaluation.pictures import Picture, draw_detections
from detr_fast.evaluation.plots import draw_precision_recall
from detr_fast.files import write_json

PICTURES = 12
PICTURE_THRESHOLD = 0.5
"""Least score of a box that is drawn."""


def write_evaluation(evaluation: Evaluation, dataset: CocoDataset, output: Path) -> None:
    """Write evaluation.json, plots/precision_recall.png, and plots/detections.png with the data's first images.

    Raises UserError where one of them cannot be written.
    """
    write_json(output / "evaluation.json", evaluation.to_dict())
    names = category_names(dataset.coco_document()["categories"])
    shown = class_names(names)
    by_name = {name: shown[category] for category, name in names.items()}
    draw_precision_recall(evaluation, output / "plots" / "precision_recall.png", by_name)
    note = f"score at least {PICTURE_THRESHOLD}"
    draw_detections(pictures(evaluation, dataset, shown), output / "plots" / "detections.png", note=note)


def pictures(evaluation: Evaluation, dataset: CocoDataset, names: dict[int, str]) -> list[Picture]:
    """Return the first PICTURES images that were evaluated, with true and predicted boxes; `names` by category id."""
    rows = evaluation.detections
    evaluated = set(rows[:, IMAGE_ID].tolist())
    records = [record for record in dataset.records if record.id in evaluated][:PICTURES]
    drawn = rows[rows[:, SCORE] >= PICTURE_THRESHOLD]
    made = []
    for record in records:
        try:
            made.append(picture(dataset, record, drawn[drawn[:, IMAGE_ID] == record.id], names))
        except UserError as error:  # taken away since it was evaluated
            warnings.warn(f"Left out of the pictures: {error}")
    return made


def picture(dataset: CocoDataset, record: ImageRecord, rows: np.ndarray, names: dict[int, str]) -> Picture:
    """Make the picture of one image with its annotations and its detections `rows` (N, 7)."""
    category_of = {label: category for category, label in dataset.label_of.items()}
    low, size = np.split(rows[:, X : HEIGHT + 1], 2, axis=1)
    return Picture(
        image=decode_image(record.path).permute(1, 2, 0).numpy(),
        title=record.path.name,
        true_boxes=record.boxes_xyxy_px,
        true_names=[names[category_of[label]] for label in record.labels.tolist()],
        boxes=np.hstack((low, low + size)),
        names=[names.get(int(category), str(int(category))) for category in rows[:, CATEGORY_ID]],
        scores=rows[:, SCORE].tolist(),
    )
