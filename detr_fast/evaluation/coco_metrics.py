"""COCO's twelve numbers and precision-recall curves of a set of detections.

hotcoco computes them; pycocotools, the referee (`referee.py`), gives the same bits a hundred times slower. Both are
given the same cleaned-up ground truth, so that neither's pitfalls are met.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import hotcoco
import numpy as np

from detr_fast.config import require
from detr_fast.data.batch import Batch
from detr_fast.data.checks import COCO_DETECTIONS
from detr_fast.data.coco import CocoDataset
from detr_fast.evaluation.inference import CATEGORY_ID, IMAGE_ID, NAMED_AT_MOST, Detects, collect_detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In the evaluators' order: average precision over IoU 0.50:0.95, at 0.50, at 0.75; of small (below 32² px), medium and
large (above 96² px) objects; average recall with 1, 10 and 100 detections an image; again by size."""
ABSENT = -1.0
"""COCO's value of a number that no object of the data bears on, such as APs without small objects."""
NOTHING_MEASURED = "no AP: the data has no object to find"
UNLIMITED = ("AP_all_detections", "AP50_all_detections", "AR_all_detections")
"""AP, AP50 and average recall without COCO's limit of 100 detections of a class on an image."""
ALL_AREAS, MOST_DETECTIONS = 0, -1
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""The twelve numbers, which are COCO's where `most` is COCO_DETECTIONS; precision and scores (IoU thresholds, recall
steps, categories, areas, detection limits), with categories by ascending id; recall, without the steps; these."""
Evaluator = Callable[[dict[str, Any], np.ndarray, int], Arrays]
"""A cleaned document, rows (N, 7), and the most detections of a class on an image that count, to `Arrays`."""


@dataclass(frozen=True)
class OperatingPoint:
    """Precision, recall and F1 of the detections with at least `threshold` as score: means over the classes."""

    threshold: float
    precision: float
    recall: float
    f1: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """One curve a class, at the recall steps (R,) = 0, 0.01, ..., 1 that COCO's evaluation samples.

    `precision` (K, R) is interpolated as in COCO's: the best at this recall or beyond; 0 where it is never reached.
    `scores` (K, R) are those of the detections that reach the recall.
    """

    names: tuple[str, ...]
    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray

    def best_f1(self) -> OperatingPoint:
        """Find the threshold with the largest mean F1 over the classes, and that mean's precision and recall."""
        thresholds = np.unique(self.scores[self.scores > 0])
        if not len(thresholds):
            return OperatingPoint(threshold=0.0, precision=0.0, recall=0.0, f1=0.0)
        points = np.array([self._at(k, thresholds) for k in range(len(self.names))])  # (K, 3, thresholds)
        precision, recall, f1 = points.mean(axis=0)
        best = int(f1.argmax())
        return OperatingPoint(float(thresholds[best]), float(precision[best]), float(recall[best]), float(f1[best]))

    def _at(self, k: int, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return class `k`'s precision, recall and F1 at each of `thresholds`."""
        reached = np.searchsorted(-self.scores[k], -thresholds, side="right")  # scores fall as recall rises
        last = np.maximum(reached - 1, 0)
        precision = np.where(reached > 0, self.precision[k, last], 0.0)
        recall = np.where(reached > 0, self.recall[last], 0.0)
        sum_of_both = precision + recall
        f1 = np.divide(2 * precision * recall, sum_of_both, out=np.zeros_like(sum_of_both), where=sum_of_both > 0)
        return precision, recall, f1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of an evaluation. Numbers are in [0, 1], or ABSENT."""

    metrics: dict[str, float]
    """The twelve METRICS."""
    per_class: dict[str, dict[str, float]]
    """AP and AP50 by class name."""
    curves: PrecisionRecall
    """At IoU 0.50, of the classes that the data has objects of."""
    detections: np.ndarray
    """Rows (N, 7): image id, x, y, width, height in pixels, score, category id; see inference.py."""
    unlimited: dict[str, float] = field(default_factory=dict)
    """UNLIMITED, where the data has images with more objects of a class than COCO counts detections; else empty."""

    @property
    def measured(self) -> dict[str, float]:
        """Return the metrics that the data bears on; none where it has no object."""
        return {name: value for name, value in self.metrics.items() if value > ABSENT}

    @property
    def operating_point(self) -> OperatingPoint:
        """Return precision and recall at the score threshold that serves the classes best."""
        return self.curves.best_f1()

    def to_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds: None for what the data has no object for."""
        point = self.operating_point.to_dict() if self.measured else None
        note = {} if self.measured else {"note": NOTHING_MEASURED}
        found = {**self.metrics, **self.unlimited, "at_best_f1": point, "per_class": self.per_class}
        return {**note, **without_absent(found)}

    def line(self) -> str:
        """Write the numbers that matter most."""
        shown = {name: value for name, value in self.measured.items() if name in ("AP", "AP50")} | self.unlimited
        return "  ".join(f"{name} {value:.3f}" for name, value in shown.items()) or NOTHING_MEASURED


def without_absent(value: Any) -> Any:
    """Return a copy of what is to be json, in which None stands for ABSENT."""
    if isinstance(value, dict):
        return {name: without_absent(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_absent(one) for one in value]
    return None if value == ABSENT else value


def evaluate_detector(
    detector: Detects, dataset: CocoDataset, batches: Iterable[Batch], evaluator: Evaluator | None = None
) -> Evaluation:
    """Evaluate the detections on `batches` (an evaluation loader over `dataset`) against the data's annotations.

    Images that no batch brought, because they could not be read, are left out with a warning. With several processes
    each runs its own part, and all return the same. The network's mode is restored. Raises UserError for outputs that
    are not finite and for classes that the data does not have.
    """
    detections = collect_detections(detector, batches, dataset.categories)
    evaluated = set(detections[:, IMAGE_ID].tolist())
    require(len(evaluated) > 0, f"{dataset.annotation_file}: none of its images could be read.")
    left_out = [record.path.name for record in dataset.records if record.id not in evaluated]
    if left_out:
        shown = ", ".join(left_out[:NAMED_AT_MOST]) + (", ..." if len(left_out) > NAMED_AT_MOST else "")
        warnings.warn(f"The evaluation is without {len(left_out)} images that could not be read: {shown}")
    document = only_images(dataset.coco_document(), evaluated)
    return evaluate_detections(document, detections, evaluator)


def evaluate_detections(
    document: dict[str, Any], detections: np.ndarray, evaluator: Evaluator | None = None
) -> Evaluation:
    """Evaluate rows (N, 7) float64 (see inference.py) against a COCO document, by hotcoco unless `evaluator` is given.

    No detections at all give 0.0. Detections of categories that the document does not list are left out, as COCO's tool
    does; objects of a crowd count neither as found nor as missed.
    """
    evaluator = evaluator or run_hotcoco
    truth = clean_document(document)
    names = category_names(document["categories"])
    known = detections[np.isin(detections[:, CATEGORY_ID], list(names))]
    stats, precision, scores, _, recall_steps = evaluator(truth, known, COCO_DETECTIONS)
    category_ids = sorted(names)
    found = precision[:, :, :, ALL_AREAS, MOST_DETECTIONS]  # (IoU thresholds, recall steps, categories)
    per_class = {
        names[category]: {"AP": mean_present(found[:, :, k]), "AP50": mean_present(found[0, :, k])}
        for k, category in enumerate(category_ids)
    }
    present = [k for k in range(len(category_ids)) if found[0, 0, k] > ABSENT]
    curves = PrecisionRecall(
        names=tuple(names[category_ids[k]] for k in present),
        recall=recall_steps,
        precision=found[0].T[present],
        scores=scores[0, :, :, ALL_AREAS, MOST_DETECTIONS].T[present],
    )
    metrics = dict(zip(METRICS, map(float, stats), strict=True))
    unlimited = without_limit(truth, known, evaluator) if most_objects(truth) > COCO_DETECTIONS else {}
    return Evaluation(metrics, per_class, curves, detections, unlimited)


def without_limit(truth: dict[str, Any], detections: np.ndarray, evaluator: Evaluator) -> dict[str, float]:
    """Return the UNLIMITED numbers: AP, AP50 and recall where all detections count."""
    _, counts = np.unique(detections[:, IMAGE_ID], return_counts=True)
    _, precision, _, recall, _ = evaluator(truth, detections, int(counts.max(initial=COCO_DETECTIONS)))
    found = precision[..., ALL_AREAS, MOST_DETECTIONS]
    values = (found, found[0], recall[..., ALL_AREAS, MOST_DETECTIONS])
    return dict(zip(UNLIMITED, map(mean_present, values), strict=True))


def most_objects(document: dict[str, Any]) -> int:
    """Count the objects of one class on one image where they are most, crowds left out."""
    groups = Counter((one["image_id"], one["category_id"]) for one in document["annotations"] if not one["iscrowd"])
    return max(groups.values(), default=0)


def only_images(document: dict[str, Any], image_ids: Container[float]) -> dict[str, Any]:
    images = [one for one in document["images"] if one["id"] in image_ids]
    annotations = [one for one in document["annotations"] if one["image_id"] in image_ids]
    return {**document, "images": images, "annotations": annotations}


def clean_document(document: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with what an evaluator needs: no names, which may be in no encoding that it could read.

    Annotations are counted from 1: COCO's tool takes a match with annotation 0 for none.
    """
    annotations = [{"iscrowd": 0, **one, "id": number} for number, one in enumerate(document["annotations"], 1)]
    images = [{key: one[key] for key in ("id", "width", "height")} for one in document["images"]]
    categories = [{"id": one["id"], "name": str(one["id"])} for one in document["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def category_names(categories: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Return id to name, all distinct: a name that several categories share gets the id behind it."""
    names = {one["id"]: one["name"] for one in categories}
    while shared := {name for name, uses in Counter(names.values()).items() if uses > 1}:
        names = {id_: f"{name} ({id_})" if name in shared else name for id_, name in names.items()}
    return names


def mean_present(values: np.ndarray) -> float:
    """Return the mean without ABSENT entries; ABSENT where there is nothing else."""
    present = values[values > ABSENT]
    return float(present.mean()) if present.size else ABSENT


def run_hotcoco(truth: dict[str, Any], detections: np.ndarray, most: int) -> Arrays:
    ground = hotcoco.COCO(truth)
    found = ground.load_res(detections) if len(detections) else hotcoco.COCO(without_annotations(truth))
    evaluator = hotcoco.COCOeval(ground, found, "bbox")
    evaluator.params.max_dets = [1, 10, most]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summary_lines()  # computes the numbers without printing them
    result = evaluator.eval
    assert result is not None  # after accumulate()
    found_and_scored = (result["precision"], result["scores"], result["recall"])
    return np.array(evaluator.stats), *found_and_scored, np.array(evaluator.params.rec_thrs)


def without_annotations(document: dict[str, Any]) -> dict[str, Any]:
    """Return the detections of a model that finds nothing: both tools refuse or fail on an empty list of results."""
    return {**document, "annotations": []}
