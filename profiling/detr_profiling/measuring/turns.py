"""Two configurations that take turns, and whether one of them has won."""

from dataclasses import dataclass, field
from itertools import chain

from detr_profiling.measuring.timing import Timing

LEAST_GAIN = 0.01
"""Least gain, as a fraction of the time, that is worth another way of running."""


@dataclass
class Turns:
    """Holds the times of the best so far and of a candidate, a Timing each turn."""

    best: list[Timing] = field(default_factory=list)
    candidate: list[Timing] = field(default_factory=list)

    def joined(self) -> tuple[Timing, Timing]:
        """Join all runs of the best so far, and all of the candidate."""
        best, candidate = (
            Timing(tuple(chain.from_iterable(turn.runs_ms for turn in side))) for side in (self.best, self.candidate)
        )
        return best, candidate

    @property
    def iqr_ms(self) -> float:
        """Return the mean of both interquartile ranges."""
        return sum(side.q3_ms - side.q1_ms for side in self.joined()) / 2

    def why_no_gain(self) -> str | None:
        """Say why the candidate has not won; None where it was faster in every turn and by more than the IQR."""
        best, candidate = self.joined()
        gain_ms = best.median_ms - candidate.median_ms
        if gain_ms <= 0:
            return "slower"
        if gain_ms <= self.iqr_ms:
            return f"within the IQR of {self.iqr_ms:.2g} ms"
        if gain_ms <= LEAST_GAIN * best.median_ms:
            return f"gains less than {LEAST_GAIN:.0%}"
        turns = zip(self.best, self.candidate, strict=True)
        return None if all(a.median_ms > b.median_ms for a, b in turns) else "not faster in every turn"
