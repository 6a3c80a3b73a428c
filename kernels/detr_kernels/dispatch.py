"""Where Triton can run, which form of a kernel runs, with the reason, and the one way by which a kernel is launched."""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from detr_kernels.language import INSTALLED, INTERPRETED

Backend = Literal["auto", "triton", "ref"]
"""triton: our kernel; ref: plain torch; auto: what was measured to be faster in a whole step on that device."""

MEASURED: dict[str, dict[str, tuple[Any, str]]] = {}
"""Device name -> kernel -> the form that is the default there, and the measurement that made it so, for the reason.

Empty: nothing has been measured on a GPU yet, so `auto` is plain torch.
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels take."""

Launch = Callable[..., None]
_launcher: ContextVar[Launch | None] = ContextVar("launcher", default=None)


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not less than `number`; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton cannot run on `device`, and what would help; None where it can."""
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
    """Say what is missing of what Triton builds its launchers with, once for each kernel: a C compiler and Python.h."""
    return _no_launcher()


@functools.cache  # not below the mark: Dynamo traces what a cache wraps, and would not see the mark
def _no_launcher() -> str | None:
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang")):
        return "Triton needs a C compiler: sudo apt install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Triton needs Python.h: sudo apt install python3-dev"
    return None


def choose_backend(kernel: str, device: torch.device, asked: Backend = "auto") -> tuple[Literal["triton", "ref"], str]:
    """The form of `kernel` to run on `device`, and why. Raises RuntimeError where Triton is asked for and cannot run.

    Asks the device for nothing but its name.
    """
    if asked not in ("auto", "triton", "ref"):
        raise ValueError(f"backend must be auto, triton or ref, not {asked!r}")
    if asked == "ref":
        return "ref", "asked for"
    problem = why_not_triton(device)
    if asked == "triton":
        if problem:
            raise RuntimeError(f"{kernel}: {problem}. Or ask for backend='ref'.")
        return "triton", "asked for"
    if problem or device.type == "cpu":
        return "ref", problem or "a CPU runs Triton in tests alone"
    return measurement(kernel, device) or ("ref", "no other form was measured to be faster on this GPU")


@torch.compiler.assume_constant_result
def measurement(kernel: str, device: torch.device) -> tuple[Any, str] | None:
    """The form of `kernel` that won on this GPU, with what was measured; None where nothing did."""
    if device.type != "cuda" or not torch.cuda.is_available():  # a fake device
        return None
    return MEASURED.get(torch.cuda.get_device_name(device), {}).get(kernel)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs the Triton `kernel` with `grid` programs on the device of its first tensor; an empty grid runs nothing.

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
    """Within it, `launch` calls `replacement(kernel, grid, *arguments, **options)` and runs nothing itself."""
    token = _launcher.set(replacement)
    try:
        yield
    finally:
        _launcher.reset(token)
