"""The parts of a step by name: ranges in a profiler's trace, and known to whoever counts work while they are open."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch.profiler import record_function

STAGES = (
    *("data wait", "copy", "pixels"),
    *("forward", "backbone", "encoder", "decoder", "heads", "postprocess"),
    *("loss", "matching", "backward", "optimizer"),
)
"""In the order of a step or an inference. Forward holds the four after it, loss holds matching: their own time is what
these leave."""

_open: list[str] = []


class _Stage(record_function):
    def __enter__(self) -> Self:
        _open.append(self.name)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _open.pop()


def stage(name: str) -> AbstractContextManager[Any]:
    """A range named `name`, one of STAGES, while it is open: about 6 us, and nothing at all in a compiled graph."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return _Stage(name)


def current_stage() -> str | None:
    """The innermost stage that is open in this process."""
    return _open[-1] if _open else None
