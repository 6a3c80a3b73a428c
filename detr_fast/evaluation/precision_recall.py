"""Precision-recall curves, and the score threshold at which a detector serves best."""

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class OperatingPoint:
    """What keeping the detections with at least `threshold` as score gives, as a mean over the classes."""

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
        """The threshold with the largest mean F1 over the classes, and that mean's precision and recall."""
        thresholds = np.unique(self.scores[self.scores > 0])
        if not len(thresholds):
            return OperatingPoint(threshold=0.0, precision=0.0, recall=0.0, f1=0.0)
        points = np.array([self._at(k, thresholds) for k in range(len(self.names))])  # (K, 3, thresholds)
        precision, recall, f1 = points.mean(axis=0)
        best = int(f1.argmax())
        return OperatingPoint(float(thresholds[best]), float(precision[best]), float(recall[best]), float(f1[best]))

    def _at(self, k: int, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Class `k`'s precision, recall and F1 at each of `thresholds`."""
        reached = np.searchsorted(-self.scores[k], -thresholds, side="right")  # scores fall as recall rises
        last = np.maximum(reached - 1, 0)
        precision = np.where(reached > 0, self.precision[k, last], 0.0)
        recall = np.where(reached > 0, self.recall[last], 0.0)
        sum_of_both = precision + recall
        f1 = np.divide(2 * precision * recall, sum_of_both, out=np.zeros_like(sum_of_both), where=sum_of_both > 0)
        return precision, recall, f1
