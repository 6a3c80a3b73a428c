"""Times of something that is run many times, with their interquartile range (IQR).

On a GPU a run is several calls issued back to back, as training issues its steps: the host waits for the device at the
run's two ends alone, so neither its way to the first kernel nor the copy of a batch counts where they hide behind the
step before.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from detr_profiling.pages import formats

STEADY_AFTER = {"cpu": 2, "cuda": 6}
"""Calls with inputs of one shape, of which the last neither compiles nor chooses anything, and on a GPU is the replay
of a graph where one is captured at all."""
LEAST_CALLS, MOST_CALLS = 4, 50
ENOUGH_MS = 500
"""Milliseconds that a run on a GPU takes at least, within the bounds above."""


@dataclass(frozen=True)
class Timing:
    """Holds each run's time in ms, or a call's where a run is of several.

    Reported are the median, the interquartile range (IQR) and the number of runs.
    """

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

    def _quantile(self, fraction: float) -> float:
        return float(np.quantile(self.runs_ms, fraction))

    def text(self) -> str:
        """Format as `302 (11, 5 runs)`: milliseconds, the interquartile range (IQR), the runs."""
        return formats.timing(self.median_ms, self.q1_ms, self.q3_ms, self.runs)

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median_ms, "q1": self.q1_ms, "q3": self.q3_ms, "runs": self.runs}

    def columns(self, prefix: str = "") -> dict[str, float]:
        """Name the figures as the columns of a table, in ms: `median_ms`, `q1_ms`, `q3_ms`, and `runs`."""
        return {f"{prefix}{name}": getattr(self, name) for name in ("median_ms", "q1_ms", "q3_ms", "runs")}

    def __truediv__(self, steps: int) -> "Timing":
        """Return the times of one step, where each run was of `steps`."""
        return Timing(tuple(run_ms / steps for run_ms in self.runs_ms))

    def __add__(self, other: Self) -> "Timing":
        """Pool both."""
        return Timing(self.runs_ms + other.runs_ms)


def measure(
    run: Callable[[], Any], synchronize: Callable[[], None], rounds: int, warmup: int = 1, calls: int = 1
) -> Timing:
    """Time `rounds` runs of `calls` calls, issued back to back, each from an idle device to the end of its work, after
    `warmup` runs that are not counted. The times are of one call."""
    times_ms = []
    for index in range(warmup + rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        if index >= warmup:
            times_ms.append((time.perf_counter() - began) * 1e3)
    return Timing(tuple(times_ms)) / calls


def calls_a_run(device_type: str, call_ms: float) -> int:
    """Choose how many calls to issue back to back: one on a CPU, where each waits for the one before anyway."""
    if device_type != "cuda":
        return 1
    return min(MOST_CALLS, max(LEAST_CALLS, math.ceil(ENOUGH_MS / call_ms)))
