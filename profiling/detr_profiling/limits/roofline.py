"""How far each stage of a step is from what the machine allows.

A stage takes no less than its FLOPs at the rate of a large matrix product, and no less than the bytes that must move at
the rate of a large copy: the larger of the two is its floor (Williams et al. 2009). What counts as work, and which
bytes must move, `detr_profiling.limits.counting` says.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from detr_fast.profiler_ranges import PROFILER_RANGES
from detr_profiling.limits.counting import NOTHING, Work, count_work
from detr_profiling.limits.peaks import Peaks
from detr_profiling.tracing.breakdown import OTHER

__all__ = ["Roofline", "StageRoofline", "Work", "count_work", "roofline"]

WITHIN = {"backbone": "forward", "encoder": "forward", "decoder": "forward", "heads": "forward", "matching": "loss"}
"""Stages that are part of another one where the model is compiled, and only that one has a time."""
NO_FLOOR = ("data wait", "copy")
"""Stages with other limits: disks, workers, the way from the host to the device."""
LEAST_FLOOR_MS = 1e-3
"""Less is no floor: to start any work takes longer."""

Bound = Literal["memory", "compute"]


@dataclass(frozen=True)
class StageRoofline:
    """One stage. None: without a floor, or without a time."""

    name: str
    gflop: float
    """10^9 operations, not multiply-adds."""
    minimum_mib: float
    """What must move."""
    moved_mib: float
    """What moves if every operator fetches its inputs and stores its outputs."""
    ms: float | None
    """As measured."""
    floor_ms: float | None
    bound: Bound | None
    """Which of the two limits is the floor."""
    distance: float | None
    """How many times the floor it took. Where all fits into caches it may be less than 1."""
    mfu: float | None
    """The share of the product's rate at which its FLOPs were done."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Roofline:
    peaks: Peaks
    stages: tuple[StageRoofline, ...]
    """In the order of a step; what no stage covers is last, as "other"."""
    total: StageRoofline
    """The whole step. Its floor is the sum of the stages', as one follows the other; what bounds it is what bounds the
    larger part of that sum."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "peaks": self.peaks.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "total": self.total.to_dict(),
        }


def roofline(work: Mapping[str, Work], stage_ms: Mapping[str, float], step_ms: float, peaks: Peaks) -> Roofline:
    """Work and measured milliseconds, both by stage and without those within it, against the machine's peaks.

    Of a stage that has work but no time, as in a compiled model, the work is added to that of the stage around it.
    """
    joined: dict[str, Work] = {}
    for name, part in work.items():
        place = WITHIN.get(name, name)
        place = place if name not in stage_ms and place in stage_ms else name
        joined[place] = joined.get(place, NOTHING) + part
    names = [name for name in (*PROFILER_RANGES, OTHER) if name in stage_ms or name in joined]
    stages = tuple(_stage(name, joined.get(name, NOTHING), stage_ms.get(name), peaks) for name in names)
    floors_ms: dict[Bound, float] = {"memory": 0.0, "compute": 0.0}
    for stage in stages:
        if stage.floor_ms is not None and stage.bound is not None:
            floors_ms[stage.bound] += stage.floor_ms
    total = _row("total", sum(joined.values(), NOTHING), step_ms, floors_ms, sum(floors_ms.values()), peaks)
    return Roofline(peaks, stages, total)


def _stage(name: str, work: Work, ms: float | None, peaks: Peaks) -> StageRoofline:
    limits_ms: dict[Bound, float] = {
        "memory": work.minimum_bytes / peaks.copy_gb_s / 1e6,
        "compute": work.flop / peaks.product_tflop_s / 1e9,
    }
    if name in NO_FLOOR:
        limits_ms = dict.fromkeys(limits_ms, 0.0)
    return _row(name, work, ms, limits_ms, max(limits_ms.values()), peaks)


def _row(
    name: str, work: Work, ms: float | None, limits_ms: dict[Bound, float], floor_ms: float, peaks: Peaks
) -> StageRoofline:
    """`limits_ms` names the bound: the larger one. A time of 0 is none."""
    floor_ms = floor_ms if floor_ms >= LEAST_FLOOR_MS else 0.0
    bound: Bound = max(limits_ms, key=limits_ms.__getitem__)
    return StageRoofline(
        name=name,
        gflop=work.flop / 1e9,
        minimum_mib=work.minimum_bytes / 2**20,
        moved_mib=work.moved_bytes / 2**20,
        ms=ms,
        floor_ms=floor_ms or None,
        bound=bound if floor_ms else None,
        distance=ms / floor_ms if ms and floor_ms else None,
        mfu=work.flop / (ms * peaks.product_tflop_s * 1e9) if ms and floor_ms else None,
    )
