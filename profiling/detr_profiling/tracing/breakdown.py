"""What a step is made of: time by stage on the host and on the device, idleness, launches, the dearest operators."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detr_profiling.measuring.timing import Timing
from detr_profiling.tracing.timeline import RANGES, Span, Timeline

OTHER = "other"
"""What no stage covers."""
MOST_ROWS = 25
LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch)")


@dataclass(frozen=True)
class StageTime:
    """One stage's own time, without that of stages within it, over the profiled steps."""

    name: str
    timing: Timing
    """Of the host, from the beginning of its ranges to their end; several in a step are added."""
    share: float
    """Of the host's time in all steps; those of all stages add up to 1."""
    device_ms: float | None
    """Median time of what it launched, streams added; None without a GPU."""

    def to_dict(self) -> dict[str, Any]:
        timing = self.timing.to_dict()
        return {
            "name": self.name,
            "median_ms": timing["median"],
            "q1_ms": timing["q1"],
            "q3_ms": timing["q3"],
            "runs": timing["runs"],
            "share": self.share,
            "device_ms": self.device_ms,
        }


def stage_times(timeline: Timeline) -> list[StageTime]:
    """Of every stage that occurs, in the order of a step, and of what is between them."""
    steps = len(timeline.steps)
    own_ns: dict[str, list[int]] = defaultdict(lambda: [0] * steps)
    for span in timeline.stages.spans:
        step = timeline.step_at(span.start_ns)
        if step is not None and span.lane == timeline.steps[0].lane:
            own_ns[span.name][step] += span.own_ns
    lengths = [step.duration_ns for step in timeline.steps]
    covered = [sum(column) for column in zip(*own_ns.values(), strict=True)] or [0] * steps
    own_ns[OTHER] = [length - part for length, part in zip(lengths, covered, strict=True)]
    device_ms = device_times_ms(timeline)
    return [
        StageTime(
            name,
            Timing(tuple(value / 1e6 for value in own_ns[name])),
            sum(own_ns[name]) / sum(lengths),
            None if device_ms is None else float(np.median(device_ms[name])),
        )
        for name in (*RANGES, OTHER)
        if name in own_ns
    ]


def device_times_ms(timeline: Timeline) -> dict[str, list[float]] | None:
    """Milliseconds in each step of what each stage launched, streams added; None where nothing ran on a device."""
    if not timeline.device:
        return None
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(timeline.steps))
    for step, call, work in timeline.launched():
        times[timeline.stage_at(call.lane, call.start_ns) or OTHER][step] += work.duration_ns / 1e6
    return times


def idle_share(timeline: Timeline) -> float | None:
    """Median share of a step in which nothing runs on the device, neither kernel nor copy; None without one.

    Each step begins with an idle device where the recorder waits at its end, so the way to the first kernel counts.
    """
    if not timeline.device:
        return None
    busy = merged((work.start_ns, work.end_ns) for work in timeline.device)
    shares = []
    for step in timeline.steps:
        inside = (min(end, step.end_ns) - max(start, step.start_ns) for start, end in busy)
        shares.append(1 - sum(max(0, length) for length in inside) / step.duration_ns)
    return float(np.median(shares))


def merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of intervals, as intervals that do not touch, ascending."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def launches_per_step(timeline: Timeline) -> tuple[float, str]:
    """How many, the mean over the steps, and of what: kernels on a GPU, where a whole graph is one launch; else torch's
    operators, those within others too. Loops that torch.compile wrote are no operators."""
    if timeline.device:
        calls = [span for span in timeline.calls if LAUNCH.match(span.name)]
        found = {span.correlation for span in calls if timeline.step_at(span.start_ns) is not None}
        return len(found) / len(timeline.steps), "kernel launches"
    spans = (span for span in timeline.operators.spans if is_operator(span))
    return sum(timeline.step_at(span.start_ns) is not None for span in spans) / len(timeline.steps), "operators"


def is_operator(span: Span) -> bool:
    """Not a node of autograd's graph, a compiled region or the like, which are recorded as operators too."""
    return "::" in span.name and not span.name.startswith("autograd::")


@dataclass(frozen=True)
class Usage:
    """What all calls of one operator or kernel take, per step: means over the steps."""

    name: str
    calls: float
    cpu_ms: float | None
    """Its own time on the host, without what it calls; None for a kernel."""
    device_ms: float | None
    """Of what it launched itself; None without a GPU."""
    share: float
    """Of all that runs on the device; on a CPU of the step."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def operator_usage(timeline: Timeline) -> list[Usage]:
    """The dearest operators: by their device time where there is a GPU, else by their own time on the host."""
    calls, cpu_ns, device_ns = Counter[str](), Counter[str](), Counter[str]()
    for span in timeline.operators.spans:
        if timeline.step_at(span.start_ns) is not None:
            calls[span.name] += 1
            cpu_ns[span.name] += span.own_ns
    for _, call, work in timeline.launched():
        operator = timeline.operators.innermost(call.lane, call.start_ns)
        if operator is not None:
            device_ns[operator.name] += work.duration_ns
    if not timeline.device:
        return usages(len(timeline.steps), calls, cpu_ns, None, sum(step.duration_ns for step in timeline.steps))
    return usages(
        len(timeline.steps), calls, cpu_ns, device_ns, sum(work.duration_ns for *_, work in timeline.launched())
    )


def kernel_usage(timeline: Timeline) -> list[Usage]:
    """The dearest kernels and copies on the device."""
    calls, device_ns = Counter[str](), Counter[str]()
    for _, _, work in timeline.launched():
        calls[work.name] += 1
        device_ns[work.name] += work.duration_ns
    return usages(len(timeline.steps), calls, None, device_ns, device_ns.total())


def usages(
    steps: int, calls: Counter[str], cpu_ns: Counter[str] | None, device_ns: Counter[str] | None, total_ns: int
) -> list[Usage]:
    """One row a name, those with the largest part of `total_ns` first: of the device's time if given, else the
    host's."""

    def per_step_ms(times_ns: Counter[str] | None, name: str) -> float | None:
        return None if times_ns is None else times_ns[name] / 1e6 / steps

    parts = (device_ns if device_ns is not None else cpu_ns) or Counter[str]()
    rows = [
        Usage(
            name,
            calls[name] / steps,
            per_step_ms(cpu_ns, name),
            per_step_ms(device_ns, name),
            parts[name] / total_ns if total_ns else 0.0,
        )
        for name in calls
    ]
    return sorted(rows, key=lambda row: (-row.share, -(row.cpu_ms or 0.0)))[:MOST_ROWS]
