"""Launching of Triton kernels, the one way for all, and where Triton can run."""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_kernels.registry import Backend, Facts
from detr_kernels.triton_compat import INSTALLED, INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels take."""

Launch = Callable[..., None]
_launcher: ContextVar[Launch | None] = ContextVar("launcher", default=None)


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not less than `number`; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()


def why_not_triton(device: torch.device) -> str | None:
    """Say why Triton cannot run on `device`, and what would help; None where it can."""
    if not INSTALLED:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if INTERPRETED else "Triton has no CPU backend; TRITON_INTERPRET=1 runs it slowly, for tests"
    if device.type != "cuda":
        return f"Triton does not run on {device.type}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which is for the CPU: unset it"
    return why_no_launcher()


@torch.compiler.assume_constant_result
def why_no_launcher() -> str | None:
    """Say what Triton lacks for building its launchers, of a C compiler and Python.h; None if nothing."""
    return _no_launcher()


@functools.cache  # not below the mark: Dynamo traces what a cache wraps, and would not see the mark
def _no_launcher() -> str | None:
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        return "Triton needs a C compiler: sudo apt install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python.h: sudo apt install python3-dev"
    return None


def why_not_triton_kernel(facts: Facts) -> str | None:
    """Say why a Triton kernel cannot run there; None where it can."""
    return why_not_triton(facts.device)


def unmeasured(facts: Facts) -> str | None:
    """Say why `auto` takes no Triton kernel that nobody has measured on this machine."""
    if facts.device.type == "cpu":
        return "a CPU runs Triton in tests alone"
    return "nobody has measured it to be faster on this GPU: python -m detr_profiling tune does"


TRITON = Backend("triton", why_not_triton_kernel, unmeasured)
"""Our kernel, where nothing else decides where it runs."""
REFERENCE = Backend("ref")
"""Plain torch."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run the Triton `kernel` with `grid` programs on the device of its first tensor; an empty grid runs nothing.

    Under `launches_to`, hands the launch over instead. Raises RuntimeError where Triton cannot run on that device.
    """
    if 0 in grid:
        return
    if replacement := _launcher.get():
        replacement(kernel, grid, *arguments, **options)
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if problem := why_not_triton(device):
        raise RuntimeError(problem)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


@contextmanager
def launches_to(replacement: Launch) -> Iterator[None]:
    """Make `launch` call `replacement(kernel, grid, *arguments, **options)` instead of running anything."""
    token = _launcher.set(replacement)
    try:
        yield
    finally:
        _launcher.reset(token)
