"""Reads a profiler's trace back: what happened when, within what, and for which profiler range of a step.

torch adds up operators and kernels (`key_averages()`). The rest is read from the Chrome trace, because the events that
torch hands out do not say it (2.11). `prof.events()` adds each allocation to the operator around it, without its moment
and without the total, and nests within one thread, while autograd launches a GPU's backward pass from a thread that has
no ranges. And nothing loads events again: of a run that is over there is only the file.

A range's time is the host's, from its beginning to its end, without its inner ranges. What a GPU did belongs to the
range that was open on the host when it was launched.
"""

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from detr_fast.config import require
from detr_fast.profiler_ranges import PROFILER_RANGES

Track = tuple[Any, Any]
"""Process and thread, or device and stream."""
Event = Mapping[str, Any]

CLOSING = "device wait"
"""The range in which whoever records waits for a GPU, so that a step's work ends within the step."""
RANGES = (*PROFILER_RANGES, CLOSING)
OTHER = "other"
"""Name of the time, and the work, that no range covers."""

RANGE, OPERATOR, ALLOCATION = "user_annotation", "cpu_op", "cpu_instant_event"
CALLS = ("cuda_runtime", "cuda_driver")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the trace: ranges, operators, allocations and releases, calls of the device's runtime and driver, and
what these start on a GPU."""


@dataclass(eq=False)
class Span:
    """Holds something with a beginning and an end; times are whole nanoseconds, so that sums are exact."""

    name: str
    kind: str
    """The trace's category."""
    track: Track
    start_ns: int
    end_ns: int
    args: Mapping[str, Any] = field(default_factory=dict)
    parent: "Span | None" = None
    """The one around it on its thread, of any kind."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def correlation(self) -> int | None:
        """Return the number that a call has in common with the kernels and copies that it started on the device."""
        return self.args.get("correlation")

    def outward(self, kind: str) -> "Iterator[Span]":
        """Yield those of `kind` among it and what encloses it, innermost first."""
        span: Span | None = self
        while span is not None:
            if span.kind == kind:
                yield span
            span = span.parent


@dataclass
class Timeline:
    """Holds the parts of a trace that figures are made of."""

    steps: list[Span]
    host: list[Span]
    """Ranges, operators, calls and allocations, in the order of time, each with the one around it."""
    device: list[Span]
    """Kernels, copies and fills on a GPU, of all its streams."""

    @cached_property
    def ranges(self) -> list[Span]:
        return [span for span in self.host if span.kind == RANGE]

    @cached_property
    def operators(self) -> list[Span]:
        return [span for span in self.host if span.kind == OPERATOR]

    @cached_property
    def calls(self) -> list[Span]:
        return [span for span in self.host if span.kind in CALLS]

    @cached_property
    def allocations(self) -> list[Span]:
        return [span for span in self.host if span.kind == ALLOCATION]

    def step_of(self, span: Span) -> int | None:
        """Return the index of the step that was under way when it began."""
        index = bisect_right(self.steps, span.start_ns, key=lambda step: step.start_ns) - 1
        return index if index >= 0 and span.start_ns < self.steps[index].end_ns else None

    def range_of(self, span: Span) -> str:
        """Name the innermost range around it, else the one open on the step's own thread: autograd works on another."""
        around = next(span.outward(RANGE), None)
        if around is None:
            own = (each for each in reversed(self.ranges) if each.track == self.steps[0].track)
            around = next((each for each in own if each.start_ns <= span.start_ns < each.end_ns), None)
        return around.name if around else OTHER

    def launched(self) -> Iterator[tuple[int, Span, Span]]:
        """Yield what ran on the device for a step: the step's index, the call that started it, the work."""
        call_of = {call.correlation: call for call in self.calls}
        for work in self.device:
            call = None if work.correlation is None else call_of.get(work.correlation)
            step = None if call is None else self.step_of(call)
            if call is not None and step is not None:
                yield step, call, work


def read_timeline(path: Path) -> Timeline:
    """Read the Chrome trace at `path`, .json or .json.gz. Raises UserError for one without steps."""
    content = path.read_bytes()
    events = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"]
    return make_timeline(events, str(path))


def make_timeline(events: Iterable[Event], source: str = "The trace") -> Timeline:
    """Make it from events in any order: torch writes them by kind, not by time."""
    spans = [make_span(event) for event in events if event.get("ph") in ("X", "i") and "cat" in event]
    steps = [span for span in spans if span.kind == RANGE and span.name.startswith("ProfilerStep#")]
    steps = steps or [span for span in spans if span.kind == RANGE and span.name == "step"]
    require(bool(steps), f"{source} has no steps: call profiler.step() after each, or open a range named step.")
    named = {RANGE: RANGES, ALLOCATION: ("[memory]",)}
    return Timeline(
        steps=sorted(steps, key=lambda span: span.start_ns),
        host=nested(
            [span for span in spans if span.kind in (OPERATOR, *CALLS) or span.name in named.get(span.kind, ())]
        ),
        device=[span for span in spans if span.kind in ON_DEVICE],
    )


def make_span(event: Event) -> Span:
    start_ns = nanoseconds(event["ts"])
    end_ns = start_ns + nanoseconds(event.get("dur", 0))
    return Span(event["name"], event["cat"], (event["pid"], event["tid"]), start_ns, end_ns, event.get("args", {}))


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1e3)


def nested(spans: Sequence[Span]) -> list[Span]:
    """Order them by their beginning, and give each the one around it on its thread."""
    ordered = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    latest: dict[Track, Span] = {}
    for span in ordered:
        around = latest.get(span.track)
        while around is not None and around.end_ns < span.end_ns:
            around = around.parent
        span.parent = around
        latest[span.track] = span
    return ordered
