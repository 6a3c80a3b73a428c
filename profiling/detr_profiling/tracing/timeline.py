"""A profiler's trace, read back: ranges that nest, operators, calls of the device's driver, work on the device.

torch's `key_averages()` adds up operators and kernels. What needs to know when something happened, and within what, is
read here: stages, device synchronisations, and memory, whose totals are in the trace alone.

A stage's time is the host's, from the beginning of its range to the end, without its inner ranges. What a GPU did
belongs to the stage that was open on the host when it was launched.
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from detr_fast.config import require
from detr_fast.profiler_ranges import PROFILER_RANGES

Track = tuple[Any, Any]
"""Process and thread, or device and stream."""
Event = dict[str, Any]

CLOSING = "device wait"
"""The range in which whoever records waits for a GPU, so that a step's work ends within the step."""
RANGES = (*PROFILER_RANGES, CLOSING)
DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
CALL_KINDS = ("cuda_runtime", "cuda_driver")


@dataclass(eq=False)
class Span:
    """Holds something with a beginning and an end; times are whole nanoseconds, so that sums are exact."""

    name: str
    kind: str
    """The trace's category, as in cpu_op or kernel."""
    track: Track
    start_ns: int
    end_ns: int
    correlation: int | None = None
    """Number that a call has in common with the kernel or copy that it started on the device."""
    parent: "Span | None" = None
    """The span of its kind around it."""
    inner_ns: int = 0
    """Nanoseconds that spans of its kind take directly within it."""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def own_ns(self) -> int:
        return self.duration_ns - self.inner_ns

    def outward(self) -> "Iterator[Span]":
        """Yield it, then what encloses it, innermost first."""
        span: Span | None = self
        while span is not None:
            yield span
            span = span.parent


class Nesting:
    """Orders spans of one kind, each with the one around it on its thread."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
        self._tracks: dict[Track, list[Span]] = defaultdict(list)
        for span in self.spans:
            track = self._tracks[span.track]
            around = track[-1] if track else None
            while around is not None and around.end_ns < span.end_ns:
                around = around.parent
            if around is not None:
                span.parent = around
                around.inner_ns += span.duration_ns
            track.append(span)
        self._starts = {track: [span.start_ns for span in spans] for track, spans in self._tracks.items()}

    def innermost(self, track: Track, time_ns: int) -> Span | None:
        """Find the one that is open on `track` at that time."""
        if track not in self._tracks:
            return None
        index = bisect_right(self._starts[track], time_ns) - 1
        found = self._tracks[track][index] if index >= 0 else None
        while found is not None and found.end_ns <= time_ns:
            found = found.parent
        return found


@dataclass
class Timeline:
    """Holds the parts of a trace that figures are made of."""

    steps: list[Span]
    stages: Nesting
    operators: Nesting
    calls: list[Span]
    """To the device's runtime and driver, in the order of time."""
    device: list[Span]
    """Kernels, copies and fills on a GPU, of all its streams."""
    memory: list[Event] = field(default_factory=list)
    """Allocations and releases, as the trace has them, in the order of time."""

    @cached_property
    def _step_starts(self) -> list[int]:
        return [step.start_ns for step in self.steps]

    @cached_property
    def _call_of(self) -> dict[int, Span]:
        return {call.correlation: call for call in self.calls if call.correlation is not None}

    def step_at(self, time_ns: int) -> int | None:
        """Return the index of the step that is under way."""
        index = bisect_right(self._step_starts, time_ns) - 1
        return index if index >= 0 and time_ns < self.steps[index].end_ns else None

    def stage_at(self, track: Track, time_ns: int) -> str | None:
        """Name the innermost stage open there, else on the step's own thread: autograd works on another one for it."""
        own = self.stages.innermost(track, time_ns) or self.stages.innermost(self.steps[0].track, time_ns)
        return own.name if own else None

    def launch(self, work: Span) -> Span | None:
        """Find the call that started `work` on the device."""
        return None if work.correlation is None else self._call_of.get(work.correlation)

    def launched(self) -> Iterator[tuple[int, Span, Span]]:
        """Yield what ran on the device for a step: the step's index, the call, the work."""
        for work in self.device:
            call = self.launch(work)
            step = None if call is None else self.step_at(call.start_ns)
            if call is not None and step is not None:
                yield step, call, work


def read_timeline(path: Path) -> Timeline:
    """Read the Chrome trace at `path`, .json or .json.gz. Raises UserError for one without steps."""
    content = path.read_bytes()
    events = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"]
    return make_timeline(events, str(path))


def make_timeline(events: Sequence[Event], source: str = "The trace") -> Timeline:
    """Make it from events in any order: torch writes them by kind, not by time."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "cat" in event:
            spans[event["cat"]].append(make_span(event))
    ranges = spans["user_annotation"]
    steps = [span for span in ranges if span.name.startswith("ProfilerStep#")]
    steps = steps or [span for span in ranges if span.name == "step"]
    require(bool(steps), f"{source} has no steps: call profiler.step() after each, or open a range named step.")
    return Timeline(
        steps=sorted(steps, key=lambda span: span.start_ns),
        stages=Nesting(span for span in ranges if span.name in RANGES),
        operators=Nesting(spans["cpu_op"]),
        calls=sorted((span for kind in CALL_KINDS for span in spans[kind]), key=lambda span: span.start_ns),
        device=[span for kind in DEVICE_KINDS for span in spans[kind]],
        memory=sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]),
    )


def make_span(event: Event) -> Span:
    start_ns = nanoseconds(event["ts"])
    correlation = event.get("args", {}).get("correlation")
    track = (event["pid"], event["tid"])
    return Span(event["name"], event["cat"], track, start_ns, start_ns + nanoseconds(event["dur"]), correlation)


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1e3)
