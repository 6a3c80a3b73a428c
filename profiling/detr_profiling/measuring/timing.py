"""Times of something that is run many times, with their spread."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from detr_profiling.pages import formats


@dataclass(frozen=True)
class Timing:
    """Each run's time; what is reported is the median, the quartiles' distance and the number of runs."""

    runs_ms: tuple[float, ...]

    @property
    def runs(self) -> int:
        return len(self.runs_ms)

    @property
    def median_ms(self) -> float:
        return self._quantile(0.5)

    @property
    def q1_ms(self) -> float:
        return self._quantile(0.25)

    @property
    def q3_ms(self) -> float:
        return self._quantile(0.75)

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.runs_ms, share))

    def text(self) -> str:
        """As in `302 (11, 5 runs)`: milliseconds, the quartiles' distance, the runs."""
        return formats.timing(self.median_ms, self.q1_ms, self.q3_ms, self.runs)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median_ms, "q1": self.q1_ms, "q3": self.q3_ms, "runs": self.runs}

    def __truediv__(self, steps: int) -> "Timing":
        """Of one step, where each run was of `steps`."""
        return Timing(tuple(run_ms / steps for run_ms in self.runs_ms))

    def __add__(self, other: Self) -> "Timing":
        """Both, as one series."""
        return Timing(self.runs_ms + other.runs_ms)


def measure(run: Callable[[], Any], synchronize: Callable[[], None], rounds: int, warmup: int = 1) -> Timing:
    """`rounds` runs, each from an idle device to the end of its work, after `warmup` that are not counted."""
    times_ms = []
    for index in range(warmup + rounds):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        if index >= warmup:
            times_ms.append((time.perf_counter() - began) * 1e3)
    return Timing(tuple(times_ms))
