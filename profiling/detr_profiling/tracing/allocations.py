"""Memory over the time of a trace: its curve, its peak and who needed it, and whether it grows from step to step.

On a GPU the figures are the allocator's. On a CPU the trace knows what was allocated since it began: to that comes what
torch's tensors held before, so the curve is of tensors alone, without the process's code and libraries' workspaces.
"""

import gc
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from detr_profiling.tracing.timeline import OPERATOR, Span, Timeline

MOST_POINTS = 2000
LEAST_LEAK_MIB = 1 / 64
LEAST_LEAK_FRACTION = 1e-3
"""Fraction of the peak: memory that grows by more than this, and by more than 16 KiB, in every step leaks."""
ALLOCATORS = frozenset(
    {
        *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"),
        *("aten::zeros", "aten::zeros_like", "aten::new_zeros", "aten::ones", "aten::ones_like", "aten::full"),
        *("aten::full_like", "aten::resize_", "aten::clone", "aten::contiguous", "aten::to", "aten::_to_copy"),
    }
)
"""Operators that say nothing of what the memory is for: the one around them does."""


@dataclass(frozen=True)
class MemoryUse:
    peak_mib: float
    peak_range: str
    """The profiler range in which the peak was reached."""
    peak_operator: str | None
    """Around the allocation that reached the peak; None where it was in none."""
    curve: list[tuple[float, float]]
    """(ms since the first step began, MiB), at most 2000 points, with the highest and the lowest of each interval."""
    growth_mib_per_step: float | None
    """Median difference between the ends of one step and the next; None for a single step."""
    leaking: bool
    """True if every step after the first ends with more memory than the one before."""


def living_tensors_mib() -> float:
    """Add what the CPU tensors of this process hold that Python knows, each storage once."""
    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter) and each.is_mkldnn:  # in oneDNN's own order
            storages[id(each)] = each.numel() * each.element_size()
        elif type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" and not each.is_sparse:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 2**20


def memory_use(timeline: Timeline, before_mib: float = 0.0) -> MemoryUse | None:
    """Find the memory's curve and peak: of the GPU, if the trace has one's allocations, else of the CPU on top of
    `before_mib`; None without events."""
    on_device = [event for event in timeline.allocations if event.args["Device Type"] == 1]
    events = on_device or timeline.allocations
    if not events:
        return None
    totals = np.array([event.args["Total Allocated"] for event in events]) / 2**20
    if not on_device:
        totals += before_mib - (events[0].args["Total Allocated"] - events[0].args["Bytes"]) / 2**20
    times_ns = np.array([event.start_ns for event in events])
    highest = int(totals.argmax())
    growths = np.diff([total_at(times_ns, totals, step.end_ns) for step in timeline.steps])
    least_leak_mib = max(LEAST_LEAK_MIB, LEAST_LEAK_FRACTION * totals.max())
    return MemoryUse(
        peak_mib=float(totals[highest]),
        peak_range=timeline.range_of(events[highest]),
        peak_operator=allocating_operator(events[highest]),
        curve=thinned((times_ns - timeline.steps[0].start_ns) / 1e6, totals),
        growth_mib_per_step=float(np.median(growths)) if len(growths) else None,
        leaking=bool(len(growths)) and bool((growths > least_leak_mib).all()),
    )


def total_at(times_ns: np.ndarray, totals_mib: np.ndarray, time_ns: int) -> float:
    """Return the total after the last event before `time_ns`; before the first event, as after it."""
    return float(totals_mib[max(0, int(times_ns.searchsorted(time_ns, side="right")) - 1)])


def allocating_operator(allocation: Span) -> str | None:
    """Name the innermost operator around it that says what the memory is for; None where there is none around it."""
    around = [span.name for span in allocation.outward(OPERATOR)]
    return next((name for name in around if name not in ALLOCATORS), around[-1] if around else None)


def thinned(times_ms: np.ndarray, totals_mib: np.ndarray) -> list[tuple[float, float]]:
    """Keep all points, or of each of equally many neighbours the highest and the lowest."""
    chosen = np.arange(len(totals_mib))
    if len(chosen) > MOST_POINTS:
        intervals = np.array_split(chosen, MOST_POINTS // 2)
        extremes = {int(part[pick(totals_mib[part])]) for part in intervals for pick in (np.argmax, np.argmin)}
        chosen = np.array(sorted(extremes))
    return [(round(float(times_ms[i]), 4), round(float(totals_mib[i]), 4)) for i in chosen]
