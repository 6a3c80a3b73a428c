"""Named profiler ranges of a step; the innermost open one can be queried, as the FLOP counter does."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch.profiler import record_function

PROFILER_RANGES = (
    *("data wait", "copy", "pixels"),
    *("forward", "backbone", "encoder", "queries", "decoder", "heads", "postprocess"),
    *("loss", "matching", "backward", "optimizer"),
)
"""In the order of a step or an inference. "forward" contains the five after it, of which DETR itself has no
"queries"; "loss" contains "matching"."""

_open: list[str] = []


class _Range(record_function):
    def __enter__(self) -> Self:
        _open.append(self.name)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _open.pop()


def profiler_range(name: str) -> AbstractContextManager[Any]:
    """Open a profiler range, one of PROFILER_RANGES: about 6 us, and nothing at all in a compiled graph."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _Range(name)


def current_range() -> str | None:
    """Return the innermost range that is open in this process."""
    return _open[-1] if _open else None
