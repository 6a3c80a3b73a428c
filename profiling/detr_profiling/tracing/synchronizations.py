"""Device synchronisations: how often a step makes the host wait for the device, where, and in which operation."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from detr_profiling.tracing.breakdown import is_operator
from detr_profiling.tracing.timeline import CLOSING, OPERATOR, Span, Timeline

BLOCKING = re.compile(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize|cu(da)?(Memcpy|MemFree|Free)(?!.*Async)")
"""Calls that return when the device has done what it was given."""
TO_PAGEABLE_HOST = re.compile(r"Memcpy DtoH .*Pageable")
"""Copies that block though they are called asynchronous."""

READS = frozenset(
    {
        *("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"),
        *("aten::nonzero", "aten::masked_select", "aten::bincount"),
        *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
        "detr_kernels::assignment_scipy",
    }
)
"""Operators whose result's value or shape the host needs: on a GPU they wait."""
READS_ON_CPU_ALONE = ("aten::_fused_adam", "aten::_fused_sgd", "aten::_fused_adagrad")
"""Beginnings of operators that read their step counters on a CPU, where their kernels on a GPU do that themselves."""


@dataclass(frozen=True)
class Synchronization:
    operation: str
    """The outermost operator around it, with autograd's node where it is in one, else the call itself."""
    range: str
    """The innermost profiler range that was open."""
    per_step: float
    """Mean over the steps."""


def synchronizations(timeline: Timeline) -> list[Synchronization]:
    """List them, the most frequent first.

    On a GPU: calls that block, and asynchronous copies into pageable memory; several in one operator are one. What the
    profiling itself waits for, at a step's end, is left out.

    On a CPU nothing waits. What is counted are reads by the host: operators that would wait on a GPU, one within
    another once. A read that is no operator, as `.numpy()` and `.tolist()` on a CPU, is not seen; SciPy's assignment is
    counted as one. In "data wait" all is on the host anyway; elsewhere a read of what would stay there beside a GPU
    cannot be told from others, and is counted.
    """
    found = Counter(blocking_calls(timeline) if timeline.device else host_reads(timeline))
    rows = [Synchronization(*where, count / len(timeline.steps)) for where, count in found.items()]
    return sorted(rows, key=lambda row: (-row.per_step, row.operation, row.range))


def blocking_calls(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Yield operation and range of each wait for a GPU."""
    into_pageable = {work.correlation for work in timeline.device if TO_PAGEABLE_HOST.match(work.name)}
    seen = set()
    for call in timeline.calls:
        blocks = BLOCKING.match(call.name) or call.correlation in into_pageable
        if not blocks or timeline.step_of(call) is None or timeline.range_of(call) == CLOSING:
            continue
        operator = next(call.outward(OPERATOR), None)
        if operator is None:
            yield call.name, timeline.range_of(call)
        elif operator not in seen:
            seen.add(operator)
            yield operation(operator), timeline.range_of(call)


def host_reads(timeline: Timeline) -> Iterator[tuple[str, str]]:
    """Yield operation and range of each read by the host, on a CPU."""
    for span in timeline.operators:
        if span.name not in READS or timeline.step_of(span) is None or timeline.range_of(span) == "data wait":
            continue
        _, *around = (outer.name for outer in span.outward(OPERATOR))
        if not any(name in READS or name.startswith(READS_ON_CPU_ALONE) for name in around):
            yield operation(span), timeline.range_of(span)


def operation(inner: Span) -> str:
    """Make a name that says where: `aten::index`, or `aten::item in ProdBackward1`."""
    chain = list(inner.outward(OPERATOR))
    name = next((span.name for span in reversed(chain) if is_operator(span)), chain[-1].name)
    node = next((span.name for span in chain if "Backward" in span.name and "::" not in span.name), None)
    return f"{name} in {node}" if node else name
