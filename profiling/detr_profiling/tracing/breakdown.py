"""Breaks a step down: time by profiler range on the host and on the device, idleness, launches, the dearest operators.

Operators and kernels are torch's own sums (`key_averages`). What is by range or by step comes from the timeline.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg

from detr_profiling.measuring.timing import Timing
from detr_profiling.tracing.timeline import OTHER, RANGE, RANGES, Span, Timeline

MOST_ROWS = 25
LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch)")
CALL = re.compile(r"cu(da)?[A-Z]")
"""To the device's runtime or driver, which is no operator."""


@dataclass(frozen=True)
class RangeTime:
    """Holds one profiler range's own time, without that of ranges within it, over the profiled steps."""

    name: str
    timing: Timing
    """Host time from its beginnings to its ends; several of one name in a step are added."""
    fraction: float
    """Fraction of the host's time in all steps; those of all ranges add up to 1."""
    device_ms: float | None
    """Median time of what it launched, streams added; None without a GPU."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name} | self.timing.columns() | {"fraction": self.fraction, "device_ms": self.device_ms}


def range_times(timeline: Timeline) -> list[RangeTime]:
    """Split the steps into the ranges that occur, in the order of a step, and what is between them."""
    lengths_ns = [step.duration_ns for step in timeline.steps]
    own_ns = {OTHER: list(lengths_ns)}
    for span in timeline.ranges:
        step = timeline.step_of(span)
        if step is not None and span.track == timeline.steps[0].track:
            _, *outer = (each.name for each in span.outward(RANGE))
            around = next((name for name in outer if name in own_ns), OTHER)
            own_ns[around][step] -= span.duration_ns
            own_ns.setdefault(span.name, [0] * len(lengths_ns))[step] += span.duration_ns
    device_ms = device_times_ms(timeline)
    return [
        RangeTime(
            name,
            Timing(tuple(value / 1e6 for value in own_ns[name])),
            sum(own_ns[name]) / sum(lengths_ns),
            None if device_ms is None else float(np.median(device_ms[name])),
        )
        for name in (*RANGES, OTHER)
        if name in own_ns
    ]


def device_times_ms(timeline: Timeline) -> dict[str, list[float]] | None:
    """Add up, by range, the milliseconds of what it launched in each step, on all streams; None without a device."""
    if not timeline.device:
        return None
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(timeline.steps))
    for step, call, work in timeline.launched():
        times[timeline.range_of(call)][step] += work.duration_ns / 1e6
    return times


def idle_fraction(timeline: Timeline) -> float | None:
    """Take the median fraction of a step in which neither kernel nor copy runs on the device; None without one.

    Each step begins with an idle device, since profiling waits at its end: the way to the first kernel counts.
    """
    if not timeline.device:
        return None
    busy = merged((work.start_ns, work.end_ns) for work in timeline.device)
    fractions = []
    for step in timeline.steps:
        inside = (min(end, step.end_ns) - max(start, step.start_ns) for start, end in busy)
        fractions.append(1 - sum(max(0, length) for length in inside) / step.duration_ns)
    return float(np.median(fractions))


def merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join intervals into ones that do not touch, ascending."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def launches_per_step(timeline: Timeline) -> tuple[float, str]:
    """Count the launches, the mean over the steps, and say of what: on a GPU kernels, where a whole graph is one; else
    torch's operators, those within others too. Loops that torch.compile wrote are no operators."""
    if timeline.device:
        calls = [span for span in timeline.calls if LAUNCH.match(span.name) and timeline.step_of(span) is not None]
        return len({call.correlation for call in calls}) / len(timeline.steps), "kernel launches"
    found = [span for span in timeline.operators if is_operator(span) and timeline.step_of(span) is not None]
    return len(found) / len(timeline.steps), "operators"


def is_operator(span: Span) -> bool:
    """Tell it from a node of autograd's graph, a compiled region or the like, which are recorded as operators too."""
    return "::" in span.name and not span.name.startswith("autograd::")


@dataclass(frozen=True)
class Usage:
    """Holds what all calls of one operator or kernel take, per step: means over the steps."""

    name: str
    calls: float
    cpu_ms: float | None
    """Its own time on the host, without what it calls; None for a kernel."""
    device_ms: float | None
    """Milliseconds of device time, per step, that it launched itself; None without a GPU."""
    fraction: float
    """Fraction of all time on the device; on a CPU, of the step."""


def operator_usage(averages: Sequence[FunctionEventAvg], timeline: Timeline) -> list[Usage]:
    """List the dearest operators of `key_averages()`: by their device time where there is a GPU, else by their own time
    on the host."""
    steps, on_device = len(timeline.steps), device_total_us(averages)
    step_us = sum(step.duration_ns for step in timeline.steps) / 1e3
    found = []
    for row in averages:
        if row.device_type == DeviceType.CPU and not (row.is_user_annotation or CALL.match(str(row.key))):
            host_us, device_us = row.self_cpu_time_total, row.self_device_time_total
            fraction = device_us / on_device if on_device else host_us / step_us
            device_ms = device_us / 1e3 / steps if on_device else None
            found.append(Usage(str(row.key), row.count / steps, host_us / 1e3 / steps, device_ms, fraction))
    return dearest(found)


def kernel_usage(averages: Sequence[FunctionEventAvg], steps: int) -> list[Usage]:
    """List the dearest kernels and copies on the device, of `key_averages()` over so many steps."""
    total_us, found = device_total_us(averages), []
    for row in device_rows(averages):
        device_us = row.self_device_time_total
        fraction = device_us / total_us if total_us else 0.0
        found.append(Usage(str(row.key), row.count / steps, None, device_us / 1e3 / steps, fraction))
    return dearest(found)


def device_rows(averages: Iterable[FunctionEventAvg]) -> list[FunctionEventAvg]:
    """List the kernels, copies and fills; a range that the host opened is shown on the device too, but is none."""
    return [row for row in averages if row.device_type == DeviceType.CUDA and not row.is_user_annotation]


def device_total_us(averages: Iterable[FunctionEventAvg]) -> float:
    return sum(row.self_device_time_total for row in device_rows(averages))


def dearest(rows: list[Usage]) -> list[Usage]:
    return sorted(rows, key=lambda row: (-row.fraction, -(row.cpu_ms or 0.0)))[:MOST_ROWS]
