"""A detector run over a data set: every image's detections as the rows that COCO's evaluators read."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from detr_fast.config import UserError
from detr_fast.data.batch import Batch
from detr_fast.data.coco import Category

IMAGE_ID, X, Y, WIDTH, HEIGHT, SCORE, CATEGORY_ID = range(7)
"""Columns of the rows (N, 7) float64; boxes are in pixels of the original image."""
NAMED_AT_MOST = 10


class Detects(Protocol):
    """Interface of what is evaluated: a `Detector`, or another program's model behind the same method."""

    def detect(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (B, N), labels (B, N) and boxes xyxy (B, N, 4) in pixels of the original images."""
        ...


def collect_detections(
    detector: Detects, batches: Iterable[Batch], categories: Sequence[Category] | None
) -> np.ndarray:
    """Return all detections of all images, of every process, as rows (N, 7) float64 in ascending order of image ids.

    `categories` says which category id a label stands for; without them labels are ids. Batches do not wait
    for the device. Raises UserError for an output that is not finite, with the images' ids.
    """
    image_ids: list[int] = []
    values: list[Tensor] = []
    for batch in batches:
        values.append(row_values(*detector.detect(batch)))
        image_ids += batch.image_ids
    rows = gather_rows(join_rows(image_ids, values))
    rows = rows[np.argsort(rows[:, IMAGE_ID], kind="stable")]
    require_finite(rows)
    if categories is not None:
        rows[:, CATEGORY_ID] = category_ids(rows[:, CATEGORY_ID], categories)
    return rows


def row_values(scores: Tensor, labels: Tensor, boxes_xyxy_px: Tensor) -> Tensor:
    """Return (B, Q, 6): x, y, width, height in pixels, score, label."""
    low, high = boxes_xyxy_px.split(2, dim=-1)
    return torch.cat((low, high - low, scores[..., None], labels[..., None]), dim=-1)


def join_rows(image_ids: Sequence[int], values: Sequence[Tensor]) -> np.ndarray:
    """Join batches of `row_values` into rows (N, 7) float64; they leave the device here, all at once."""
    if not values:
        return np.zeros((0, 7))
    on_host = torch.cat([each.flatten(0, 1) for each in values]).double().cpu().numpy()
    counts = [each.shape[1] for each in values for _ in range(len(each))]
    return np.column_stack((np.repeat(np.asarray(image_ids, dtype=np.float64), counts), on_host))


def require_finite(rows: np.ndarray) -> None:
    """Raise UserError for NaN or infinity: COCO's evaluator would report an AP of 1.0 for NaN scores."""
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        images = [str(int(image)) for image in np.unique(rows[broken, IMAGE_ID])]
        more = f" and {len(images) - NAMED_AT_MOST} more" if len(images) > NAMED_AT_MOST else ""
        raise UserError(
            f"The model's scores or boxes are not finite for image {', '.join(images[:NAMED_AT_MOST])}{more}. The "
            "weights hold NaN, or values overflowed: use an earlier checkpoint, or --precision fp32."
        )


def category_ids(labels: np.ndarray, categories: Sequence[Category]) -> np.ndarray:
    """Return the category id of each label. Raises UserError for a label that stands for none."""
    ids = np.array([category.id for category in categories], dtype=np.float64)
    largest = int(labels.max(initial=-1))
    if largest >= len(ids):
        raise UserError(
            f"The model predicts class {largest}, but the data has {len(ids)} classes (0 to {len(ids) - 1}). It was "
            "trained on other classes: evaluate it on their data."
        )
    return ids[labels.astype(np.int64)]


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Return the rows of all processes, on every one of them."""
    if not dist.is_initialized():
        return rows
    gathered: list[np.ndarray] = [rows] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return np.concatenate(gathered)
