"""Average precision of the same weights, by the plain reference in float32 and by ours.

The rule: AP and AP50, over all classes and of each class, may differ from the reference's by 0.001 in float32; in
bfloat16 by 0.01 and by what one of the objects that they are of is worth.

In float32 equal functions have equal detections but for the order of nearly equal scores: in nine trained detectors AP
did not move at all, whether its weights were off by rounding or it was ours. In bfloat16 an object at the edge of an
IoU threshold falls either way, which counts most where a class has few; the reference's own AP moved by up to 0.026
with 29 objects, and a class's by up to 0.12 with 3 to 6.

NaN is looked for first: COCO's evaluators sort by score, and a NaN score passes for a perfect one.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_fast.config import UserError
from detr_fast.data.batch import Batch
from detr_fast.data.coco import CocoDataset
from detr_fast.data.loader import evaluation_loader
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
from detr_fast.options import EvaluateOptions, RuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.weights import read_detector
from detr_profiling.baselines.plain_loop import PlainBatch
from detr_profiling.reference.criterion import Scores, corners
from detr_profiling.reference.weights import reference_of

ALLOWED_FP32, ALLOWED_BF16 = 1e-3, 1e-2
"""Largest difference in AP, in [0, 1], that is allowed; in bf16 plus 1 / the number of objects."""


@dataclass(frozen=True)
class Images:
    """Names the images that AP is measured on."""

    name: str
    dataset: CocoDataset
    batches: Callable[[], Iterable[Batch]]
    """Makes the batches that AP is computed over, with all images of the data set or with some."""


@dataclass(frozen=True)
class Score:
    """Holds AP over IoU 0.50:0.95, AP at 0.50, and both by class, in [0, 1]; -1 for a class without objects."""

    ap: float
    ap50: float
    classes: dict[str, dict[str, float]]
    objects: dict[str, int]
    """By class, of those that have any."""
    images: int


def checkpoint_and_images(weights: str, data: str) -> tuple[DETR, Images]:
    """Load the model of a checkpoint, and the validation images of `data`. Raises UserError where they do not fit."""
    detector, options = read_detector(weights), EvaluateOptions.of(weights=weights, data=data, batch_size=8, workers=0)
    dataset = evaluation_dataset(detector, options)
    return detector.network, Images(data, dataset, lambda: evaluation_loader(dataset, options.batch_size, workers=0))


@torch.no_grad()
def reference_detections(model: DETR, images: Images, device: torch.device) -> np.ndarray:
    """Detect with the reference in float32 and the model's weights: rows (N, 7) as evaluation/inference.py has them.
    Raises UserError for an output that is not finite."""
    reference = reference_of(model).to(device)
    image_ids, parts = [], []
    for batch in images.batches():
        placed = PlainBatch.of(batch, model.config).to(device)
        outputs = reference(placed.images, placed.mask)
        found = outputs["pred_logits"], outputs["pred_boxes"]
        parts.append(row_values(*plain_detections(*found, placed.original_sizes, model.config.scores)))
        image_ids += batch.image_ids
    rows = join_rows(image_ids, parts)
    require_finite(rows)
    if images.dataset.categories is not None:
        rows[:, CATEGORY_ID] = category_ids(rows[:, CATEGORY_ID], images.dataset.categories)
    return rows


def plain_detections(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor, scores: Scores = "softmax"
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits (B, Q, C+1), the last of them no object, and boxes into scores and labels (B, Q) and boxes xyxy
    (B, Q, 4) in pixels. Of sigmoid scores, logits (B, Q, C), the best 100 of an image are taken, classes apart."""
    if scores == "sigmoid":
        return best_hundred(logits.sigmoid(), boxes_cxcywh, sizes_hw)
    probabilities = logits.softmax(-1)[:, :, :-1]
    height, width = sizes_hw.unbind(1)
    scale = torch.stack((width, height, width, height), 1)[:, None]  # (B, 1, 4)
    return probabilities.amax(-1), probabilities.argmax(-1), corners(boxes_cxcywh) * scale


def best_hundred(scores: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the best scores (B, Q, C) of each image, one after another: as `plain_detections` returns them."""
    images = []
    for image, size, boxes in zip(scores, sizes_hw.flip(1), corners(boxes_cxcywh), strict=True):
        best = image.flatten().argsort(descending=True)[:100]
        queries, labels = best // image.shape[1], best % image.shape[1]
        images.append((image[queries, labels], labels, boxes[queries] * size.repeat(2)))
    found, labels, boxes = (torch.stack(each) for each in zip(*images, strict=True))
    return found, labels, boxes


def score(rows: np.ndarray, images: Images) -> Score:
    shown = set(rows[:, IMAGE_ID].tolist())
    document = only_images(images.dataset.coco_document(), shown)
    names, found = category_names(document["categories"]), evaluate_detections(document, rows)
    objects = Counter(names[each["category_id"]] for each in document["annotations"] if not each.get("iscrowd"))
    return Score(found.metrics["AP"], found.metrics["AP50"], found.per_class, dict(objects), len(shown))


class AveragePrecision:
    """Measures AP of one model's weights: by the reference, then by one variant after another, each
    with its verdict."""

    def __init__(self, model: DETR, images: Images, device: torch.device) -> None:
        self.model, self.images, self.device = model, images, device
        self.scores: dict[str, Score] = {}
        self.failures: dict[str, str] = {}
        self.keep("reference", lambda: reference_detections(model, images, device))

    def keep(self, name: str, detect: Callable[[], np.ndarray]) -> bool:
        """Tell whether there is a score: outputs that are not finite have none."""
        try:
            rows = detect()
        except UserError as error:
            self.failures[name] = str(error)
            return False
        self.scores[name] = score(rows, self.images)
        return True

    def add(self, name: str, options: RuntimeOptions) -> None:
        """Measure ours as `options` say, whose precision is fp32 or bf16."""
        if self.keep(name, lambda: self.detections(options)) and "reference" in self.scores:
            failure = judge_scores(self.scores[name], self.scores["reference"], str(options.precision))
            self.failures |= {name: failure} if failure else {}

    def detections(self, options: RuntimeOptions) -> np.ndarray:
        runtime = choose_runtime(options)
        detector = Detector(place(copy_of(self.model), runtime), runtime=runtime)
        return collect_detections(detector, self.images.batches(), self.images.dataset.categories)

    def to_dict(self) -> dict[str, Any]:
        """Give AP's part of parity.json; a row without numbers has outputs that are not finite, or no objects."""
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
        in_bf16 = f"in bf16 within {ALLOWED_BF16:g} and one object's worth"
        return f"every number is within {ALLOWED_FP32:g} of the reference, {in_bf16}"


def copy_of(model: DETR) -> DETR:
    copied = DETR(model.config)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def judge_scores(found: Score, exact: Score, precision: str) -> str | None:
    """Say what is off by more than is allowed; None where nothing is."""
    for metric, mean, exact_mean in (("AP", found.ap, exact.ap), ("AP50", found.ap50, exact.ap50)):
        named = [(metric, mean, exact_mean, sum(exact.objects.values()))]
        named += [
            (f"{metric} of {label}", found.classes[label][metric], exact.classes[label][metric], objects)
            for label, objects in exact.objects.items()
        ]
        for name, value, wanted, objects in named:
            allowed = allowed_change(precision, objects)
            if not abs(value - wanted) <= allowed:  # NaN is not
                return f"{name}: NOT close, {value:.4f} for {wanted:.4f}, allowed {allowed:.2g}"
    return None


def allowed_change(precision: str, objects: int) -> float:
    """Return by how much an AP of so many objects may differ."""
    return ALLOWED_FP32 if precision == "fp32" else ALLOWED_BF16 + 1 / max(objects, 1)
