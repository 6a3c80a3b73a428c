"""Average precision of the same weights, by the plain reference and by ours in each form.

NaN is looked for first: COCO's evaluators sort by score, and a NaN score passes for a perfect one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_fast.config import EvaluateConfig, RuntimeOptions, UserError
from detr_fast.data.batching import Batch, evaluation_loader
from detr_fast.data.coco import CocoDataset
from detr_fast.detector import Detector, place
from detr_fast.evaluation.coco_metrics import category_names, evaluate_detections, only_images, without_absent
from detr_fast.evaluation.dataset import evaluation_dataset
from detr_fast.evaluation.inference import (
    CATEGORY_ID,
    IMAGE_ID,
    category_ids,
    collect_detections,
    join_rows,
    require_finite,
    row_values,
)
from detr_fast.model.detr import DETR
from detr_fast.runtime import choose_runtime
from detr_fast.weights import read_detector
from detr_profiling.comparison.closeness import closeness
from detr_profiling.peers.plain_loop import PlainBatch
from detr_profiling.reference.detr import corners
from detr_profiling.reference.weights import SCATTER_SEEDS, reference_of, scattered

AP_FLOOR = 1e-3
"""Absolute. In bf16 it is at least what one object is worth, which is more where there are few: at the edge of an IoU
threshold, or of two scores that are equal, it falls either way."""


@dataclass(frozen=True)
class Images:
    """What AP is measured on."""

    name: str
    dataset: CocoDataset
    batches: Callable[[], Iterable[Batch]]
    """Of all images or of some; AP is of those."""


@dataclass(frozen=True)
class Score:
    """AP over IoU 0.50:0.95, AP at 0.50, and both by class, in [0, 1]; -1 for a class without objects."""

    ap: float
    ap50: float
    classes: dict[str, dict[str, float]]
    objects: dict[str, int]
    """By class, of those that have any."""
    images: int


def checkpoint_and_images(weights: str, data: str) -> tuple[DETR, Images]:
    """The model of a checkpoint, and the validation images of `data`. Raises UserError where they do not fit."""
    detector, options = read_detector(weights), EvaluateConfig(weights=weights, data=data, batch_size=8, workers=0)
    dataset = evaluation_dataset(detector, options)
    return detector.network, Images(data, dataset, lambda: evaluation_loader(dataset, options.batch_size, workers=0))


@torch.no_grad()
def reference_detections(
    model: DETR, images: Images, device: torch.device, precision: str, scatter_seed: int | None = None
) -> np.ndarray:
    """Rows (N, 7) as evaluation/inference.py has them, by the reference with the model's weights, off by rounding where
    there is a `scatter_seed`. Raises UserError for an output that is not finite."""
    reference = scattered(reference_of(model), precision, scatter_seed).to(device)
    image_ids, parts = [], []
    for batch in images.batches():
        placed = PlainBatch.of(batch, model.config).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = reference(placed.images, placed.mask)
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        parts.append(row_values(*plain_detections(logits, boxes, placed.original_sizes)))
        image_ids += batch.image_ids
    rows = join_rows(image_ids, parts, model.config.num_queries)
    require_finite(rows)
    if images.dataset.categories is not None:
        rows[:, CATEGORY_ID] = category_ids(rows[:, CATEGORY_ID], images.dataset.categories)
    return rows


def plain_detections(logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and labels (B, Q), boxes xyxy (B, Q, 4) in pixels, of logits (B, Q, C+1), the last of them no object."""
    probabilities = logits.softmax(-1)[:, :, :-1]
    height, width = sizes_hw.unbind(1)
    scale = torch.stack((width, height, width, height), 1)[:, None]  # (B, 1, 4)
    return probabilities.amax(-1), probabilities.argmax(-1), corners(boxes_cxcywh) * scale


def score(rows: np.ndarray, images: Images) -> Score:
    shown = set(rows[:, IMAGE_ID].tolist())
    document = only_images(images.dataset.coco_document(), shown)
    names, found = category_names(document["categories"]), evaluate_detections(document, rows)
    objects = Counter(names[each["category_id"]] for each in document["annotations"] if not each.get("iscrowd"))
    return Score(found.metrics["AP"], found.metrics["AP50"], found.per_class, dict(objects), len(shown))


class AveragePrecision:
    """Of one model's weights: the reference's, then one variant's after another, each with its verdict."""

    def __init__(self, model: DETR, images: Images, device: torch.device) -> None:
        self.model, self.images, self.device = model, images, device
        self.scores: dict[str, Score] = {}
        self.failures: dict[str, str] = {}
        self.changes: dict[str, list[Score]] = {"fp32": []}
        """Precision -> the reference's scores in it, of the weights as they are and off by rounding; in float32 they
        are exact."""
        self.keep("reference", lambda: self.plain_detections("fp32"))

    def keep(self, name: str, detect: Callable[[], np.ndarray]) -> bool:
        """Whether there is a score: outputs that are not finite have none."""
        try:
            rows = detect()
        except UserError as error:
            self.failures[name] = str(error)
            return False
        self.scores[name] = score(rows, self.images)
        return True

    def add(self, name: str, options: RuntimeOptions) -> None:
        """Ours as `options` say, whose precision is fp32 or bf16."""
        precision = str(options.precision)
        if precision not in self.changes and "reference" in self.scores:
            self.changes[precision] = []
            plain = f"reference {precision}"
            if self.keep(plain, lambda: self.plain_detections(precision)):
                others = [score(self.plain_detections(precision, seed), self.images) for seed in SCATTER_SEEDS]
                self.changes[precision] = [self.scores[plain], *others]
        if self.keep(name, lambda: self.detections(options)) and "reference" in self.scores:
            failure = judge_scores(self.scores[name], self.scores["reference"], self.changes[precision])
            self.failures |= {name: failure} if failure else {}

    def plain_detections(self, precision: str, seed: int | None = None) -> np.ndarray:
        return reference_detections(self.model, self.images, self.device, precision, seed)

    def detections(self, options: RuntimeOptions) -> np.ndarray:
        runtime = choose_runtime(options)
        detector = Detector(place(copy_of(self.model), runtime), runtime=runtime)
        return collect_detections(detector, self.images.batches(), self.images.dataset.categories)

    def to_dict(self) -> dict[str, Any]:
        """AP's part of parity.json; a row without numbers has outputs that are not finite, or no objects."""
        names = list(dict.fromkeys((*self.scores, *self.failures)))
        scores = [(name, self.scores.get(name)) for name in names]
        classes = self.scores["reference"].classes if "reference" in self.scores else {}
        part = {
            "data": self.images.name,
            "images": max((one.images for one in self.scores.values()), default=0),
            "rows": [{"name": name, "AP": one and one.ap, "AP50": one and one.ap50} for name, one in scores],
            "classes": [
                {
                    "name": label,
                    "AP": values["AP"],
                    "by_row": {name: one.classes[label]["AP"] for name, one in self.scores.items()},
                }
                for label, values in classes.items()
            ],
            "close": not self.failures,
            "message": self.message(),
        }
        return without_absent(part)

    def message(self) -> str:
        if self.failures:
            return "; ".join(f"{name}: {failure}" for name, failure in self.failures.items())
        worth = f"within {AP_FLOOR:g} of the reference; in bf16 within that or one object's worth"
        return f"every number is {worth}, and twice the reference's own change"


def copy_of(model: DETR) -> DETR:
    copied = DETR(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def judge_scores(found: Score, exact: Score, eager: Sequence[Score] = ()) -> str | None:
    """What is off by more than closeness allows; None where nothing is. `exact` is the reference in float32; `eager` in
    the precision of `found`, more than once, where that is another. What eager changes a mean by is taken as the mean
    of its classes' changes without signs, which cancel by luck; a class is judged by the one that eager changed most.
    """
    counts = list(exact.objects.values())
    for metric, mean in (("AP", found.ap - exact.ap), ("AP50", found.ap50 - exact.ap50)):
        ours, plain = class_changes([found], exact, metric), class_changes(eager or [exact], exact, metric)
        if not counts:
            continue
        for name, error, rough, objects in (
            (metric, torch.tensor(mean).double(), plain.mean(1).max(), sum(counts)),
            (f"{metric} of a class", ours.max(), plain.max(), min(counts)),
        ):
            floor = max(AP_FLOOR, 1 / objects) if eager else AP_FLOOR
            judged = closeness(error, torch.zeros_like(error), rough, floor, name)
            if not judged:
                return judged.message
    return None


def class_changes(scores: Sequence[Score], exact: Score, metric: str) -> Tensor:
    """(scores, classes with objects) float64, without signs."""
    rows = [[one.classes[label][metric] - exact.classes[label][metric] for label in exact.objects] for one in scores]
    return torch.tensor(rows, dtype=torch.float64).abs()
