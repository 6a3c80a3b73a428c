"""How far each profiler range of a step is from what the machine allows.

A range takes no less than its FLOPs at the rate of a large GEMM,
and no less than the bytes that must move at the memory bandwidth of a large copy:
the larger of the two is its bound (the roofline model; Williams et al. 2009).
What counts as work, and which bytes must move, is defined in `detr_profiling.limits.counting`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from detr_fast.profiler_ranges import PROFILER_RANGES
from detr_profiling.limits.counting import NOTHING, Work, count_work
from detr_profiling.limits.peaks import Peaks
from detr_profiling.tracing.timeline import OTHER

__all__ = ["RangeRoofline", "Roofline", "Work", "count_work", "roofline"]

WITHIN = {"backbone": "forward", "encoder": "forward", "decoder": "forward", "heads": "forward", "matching": "loss"}
"""Ranges that are part of another one where the model is compiled, and only that one has a time."""
UNBOUNDED = ("data wait", "copy")
"""Ranges with other limits: disks, workers, the way from the host to the device."""
LEAST_BOUND_MS = 1e-3
"""A smaller bound is none: to start any work takes longer."""

Bound = Literal["memory", "compute"]


@dataclass(frozen=True)
class RangeRoofline:
    """Holds one profiler range's work, time and bound. None: no bound, or no time."""

    name: str
    gflop: float
    """10^9 operations, not multiply-adds."""
    minimum_mib: float
    """MiB that must move."""
    moved_mib: float
    """MiB that move if every operator fetches its inputs and stores its outputs."""
    ms: float | None
    """Measured time."""
    bound_ms: float | None
    bound_by: Bound | None
    """The larger of the two limits."""
    times_bound: float | None
    """Time over bound. It may be less than 1 where all fits into caches."""
    mfu: float | None
    """Model FLOP utilisation: the fraction of the GEMM's rate at which its FLOPs were done."""


@dataclass(frozen=True)
class Roofline:
    """Holds the ranges of a step, and the step, under the machine's peaks."""

    peaks: Peaks
    ranges: tuple[RangeRoofline, ...]
    """In the order of a step; what no range covers is last, as "other"."""
    total: RangeRoofline
    """The whole step. Its bound is the sum of the ranges', as one follows the other;
    it is bounded by what bounds the larger part of that sum."""


def roofline(work: Mapping[str, Work], range_ms: Mapping[str, float], step_ms: float, peaks: Peaks) -> Roofline:
    """Compare work and measured milliseconds, both by range without the ranges within it, with the machine's peaks.

    Where a range has work but no time, as in a compiled model, the work is added to that of the range around it.
    """
    joined: dict[str, Work] = {}
    for name, part in work.items():
        around = WITHIN.get(name, name)
        timed = around if name not in range_ms and around in range_ms else name
        joined[timed] = joined.get(timed, NOTHING) + part
    names = [name for name in (*PROFILER_RANGES, OTHER) if name in range_ms or name in joined]
    ranges = tuple(_range(name, joined.get(name, NOTHING), range_ms.get(name), peaks) for name in names)
    bounds_ms: dict[Bound, float] = {"memory": 0.0, "compute": 0.0}
    for row in ranges:
        if row.bound_ms is not None and row.bound_by is not None:
            bounds_ms[row.bound_by] += row.bound_ms
    total = _row("total", sum(joined.values(), NOTHING), step_ms, bounds_ms, sum(bounds_ms.values()), peaks)
    return Roofline(peaks, ranges, total)


def _range(name: str, work: Work, ms: float | None, peaks: Peaks) -> RangeRoofline:
    limits_ms: dict[Bound, float] = {
        "memory": work.minimum_bytes / peaks.bandwidth_gb_s / 1e6,
        "compute": work.flop / peaks.gemm_tflop_s / 1e9,
    }
    if name in UNBOUNDED:
        limits_ms = dict.fromkeys(limits_ms, 0.0)
    return _row(name, work, ms, limits_ms, max(limits_ms.values()), peaks)


def _row(
    name: str, work: Work, ms: float | None, limits_ms: dict[Bound, float], bound_ms: float, peaks: Peaks
) -> RangeRoofline:
    """Make a row, bounded by the larger one of `limits_ms`. A time of 0 is none."""
    bound_ms = bound_ms if bound_ms >= LEAST_BOUND_MS else 0.0
    bound: Bound = max(limits_ms, key=limits_ms.__getitem__)
    return RangeRoofline(
        name=name,
        gflop=work.flop / 1e9,
        minimum_mib=work.minimum_bytes / 2**20,
        moved_mib=work.moved_bytes / 2**20,
        ms=ms,
        bound_ms=bound_ms or None,
        bound_by=bound if bound_ms else None,
        times_bound=ms / bound_ms if ms and bound_ms else None,
        mfu=work.flop / (ms * peaks.gemm_tflop_s * 1e9) if ms and bound_ms else None,
    )
