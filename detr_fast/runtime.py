"""Where and how a model runs: device, precision, memory order, implementation; each choice made here, with its
reason."""

import ctypes
import mmap
import os
import platform
import shutil
import sysconfig
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from detr_kernels import OPERATIONS, Facts
from detr_kernels.launch import why_not_triton

from detr_fast.config import Attention, Device, Kernels, Precision, RuntimeOptions, require
from detr_fast.machine import cores
from detr_fast.model.backends import reasons, select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.freezing import frozen
from detr_fast.tuning import RUNTIME_SWITCHES, Case, Measured, Mode, Tuning, find

MOST_WORKERS = 16
"""Processes that read images where none are asked for: they read more than a GPU trains on."""


@dataclass(frozen=True)
class Runtime:
    """The choices of one run; `reasons` says for each why it was made."""

    device: torch.device
    dtype: torch.dtype
    """What matrix products and convolutions are computed in; float32 means no autocast."""
    channels_last: bool
    compile: bool
    kernels: Kernels
    attention: Attention
    reasons: dict[str, str]
    capture: bool | None = None
    """Whether steps are replayed as CUDA graphs; None: training is not, optimised inference on a GPU is."""
    optimize: bool | None = None
    """Whether inference folds and rounds weights once; None: unless --kernels ref."""
    measured: Measured = field(default_factory=dict)
    """Backends that are not asked for by name, but were measured to be fastest on this machine."""

    def workers(self, asked: int | None) -> int:
        """Return how many processes read images for this one: as asked, else on a CPU none, beside a GPU its share of
        the cores that it may use, but for one to launch kernels, up to 16."""
        if asked is not None:
            return asked
        if self.device.type != "cuda":
            return 0
        own_cores = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun sets it
        return min(max(own_cores - 1, 1), MOST_WORKERS)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def optimizes(self) -> bool:
        """Whether inference folds and rounds weights once, instead of in every call."""
        return self.optimize if self.optimize is not None else self.kernels != "ref"

    def place(self, model: DETR, named: Mapping[str, str] | None = None) -> DETR:
        """Move the model to the device, in the memory order and with the backends chosen.

        `named`: backends of single operations, before what the options ask for.
        """
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        model.to(device=self.device, memory_format=memory_format)  # type: ignore[call-overload]
        selection = select_backends(
            model,
            self.kernels,
            self.attention,
            self.dtype,
            named=named,
            measured=self.measured,
            compiled=self.compile,
        )
        self.reasons.update(reasons(model, selection, model.training))
        return model

    def place_for_inference(self, model: DETR) -> DETR:
        """As `place`, and frozen where the implementation says so: such a model cannot be trained or saved."""
        return self.for_inference(self.place(model))

    def for_inference(self, model: DETR) -> DETR:
        return frozen(model, self.dtype) if self.optimizes else model


def choose_device(asked: Device) -> tuple[torch.device, str]:
    """Raises UserError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    require(asked != "cuda" or available, "--device cuda: torch finds no GPU. Use --device cpu, or see doctor.")
    if asked == "auto":
        return (torch.device("cuda"), "a GPU is there") if available else (torch.device("cpu"), "no GPU found")
    return torch.device(asked), "asked for"


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of mallopt(3)."""
NEVER = -1
TOP_PAD_BYTES = 2**28
RESERVED_BYTES = 2**32
HUGE_PAGE_BYTES = 2**21


@cache
def keep_freed_memory() -> None:
    """Lets this process use freed memory again, instead of giving every large block back and asking for new pages, and
    asks for large pages.

    glibc maps each block of megabytes by itself, and the kernel then clears all its pages anew: a fifth of a million
    faults a training step on a CPU. What malloc takes instead is one range of addresses, the first 4 GiB of which are
    asked for in pages of 2 MiB: what lies in pages of 4 KiB is found more slowly than it is read. Memory is used only
    where it is written to. Where there is no glibc, nothing changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, TOP_PAD_BYTES)):
        libc.mallopt(name, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    reserved = libc.malloc(RESERVED_BYTES)
    if reserved:
        first = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        libc.madvise(first, RESERVED_BYTES - HUGE_PAGE_BYTES, mmap.MADV_HUGEPAGE)
        libc.free(reserved)


def choose_precision(asked: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of products and convolutions. Raises UserError for fp16 on a CPU, whose gradients would need a
    scaler."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    require(asked != "fp16" or device.type == "cuda", "--precision fp16 needs a GPU. Use bf16 or fp32 on a CPU.")
    if asked != "auto":
        return names[asked], "asked for"
    if multiplies_bf16(device):
        return torch.bfloat16, "the hardware multiplies bf16"
    return torch.float32, "the hardware does not multiply bf16"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products, not merely emulation."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def missing_for_compile() -> str | None:
    """What torch.compile lacks on a CPU, and Triton's launchers on a GPU, and how to get it; None if nothing."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        return f"there is no compiler {name}: sudo apt install g++, or set CXX to another one"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        package = ".".join(platform.python_version_tuple()[:2])
        return f"Python.h is missing: sudo apt install python{package}-dev"
    return None


def with_reasons(measured: Measured) -> dict[str, str]:
    """Word the choices as they are printed: "layer norm" -> "triton (measured here: ...)"."""
    words = {True: "yes", False: "no"}
    return {
        name.replace("_", " "): f"{words[value] if isinstance(value, bool) else value} ({reason})"
        for name, (value, reason) in measured.items()
    }


def why_not_measured(
    switch: str, value: Any, device: torch.device, dtype: torch.dtype, head_dim: int, mode: Mode = "training"
) -> str | None:
    """Say why `value` of a switch, an operation or an option, cannot run here, as far as that is known before it is
    tried; None where nothing is known."""
    if switch in OPERATIONS:
        facts = Facts(device, dtype, training=mode == "training", dropout=0.1, head_dim=head_dim)
        return OPERATIONS[switch].why_not(value, facts)
    return missing_for_compile() if (switch, value) == ("compile", True) else None


def not_asked_for(options: RuntimeOptions, tuning: Tuning | None, device: torch.device) -> Measured:
    """Take what `tuning` says of the switches that `options` leave open, and that can run on `device`; nothing with
    --no-tune and --kernels ref."""
    if tuning is None or not options.tune or options.kernels == "ref":
        return {}
    left_open = {
        "precision": options.precision == "auto",
        "compile": options.compile is None,
        "channels_last": options.channels_last is None,
        "capture": getattr(options, "capture", None) is None,
        "threads": "OMP_NUM_THREADS" not in os.environ,
        "attention": options.attention == options.kernels == "auto",
        "optimize": options.kernels == "auto" and getattr(options, "optimize", None) is None,
    }
    found = {name: each for name, each in tuning.measured().items() if left_open.get(name, options.kernels == "auto")}
    precision = found["precision"][0] if "precision" in found else options.precision
    about = device, choose_precision(precision, device)[0], USUAL_HEAD_DIM, tuning.parsed_case().mode
    problems = {name: why_not_measured(name, value, *about) for name, (value, _) in found.items()}
    for name, problem in problems.items():
        if problem:
            warnings.warn(f"{name.replace('_', ' ')} {found[name][0]} was measured to be fastest, but: {problem}")
    return {name: each for name, each in found.items() if not problems[name]}


USUAL_HEAD_DIM = 32
"""DETR's. What was measured ran with the model's own; asked is whether it runs on this device in this precision."""


def choose_runtime(options: RuntimeOptions, tuning: Tuning | None = None) -> Runtime:
    """Choose what `options` ask for by name; else what `tuning` says was measured here; else the first guess.

    Raises UserError where something asked for by name is not there.
    """
    device, device_reason = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    measured = not_asked_for(options, tuning, device)
    value = {name: found for name, (found, _) in measured.items()}
    dtype, precision_reason = choose_precision(value.get("precision", options.precision), device)
    if "threads" in value and device.type == "cpu":
        torch.set_num_threads(value["threads"])
    compiled = bool(value.get("compile", options.compile))
    channels_last = value.get("channels_last", options.channels_last is not False)
    lacking = missing_for_compile() if compiled else None
    require(lacking is None, f"--compile cannot run: {lacking}. Or leave --compile out.")
    for option in ("kernels", "attention"):
        problem = why_not_triton(device) if getattr(options, option) == "triton" else None
        require(problem is None, f"--{option} triton cannot run: {problem}. Use --{option} auto.")
    reasons = {
        "device": f"{device} ({device_reason})",
        "precision": f"{str(dtype).removeprefix('torch.')} ({precision_reason})",
        **({"measured": tuning.summary()} if tuning and options.tune and options.kernels != "ref" else {}),
        **with_reasons({name: found for name, found in measured.items() if name in RUNTIME_SWITCHES}),
    }
    return Runtime(
        device,
        dtype,
        channels_last,
        compiled,
        options.kernels,
        options.attention,
        reasons,
        capture=value.get("capture", getattr(options, "capture", None)),
        optimize=value.get("optimize", getattr(options, "optimize", None)),
        measured={name: found for name, found in measured.items() if name not in RUNTIME_SWITCHES},
    )


def runtime_for_inference(options: RuntimeOptions, model: DETR, batch_size: int) -> Runtime:
    """Choose as `choose_runtime` does, with what was measured here for `model` on `batch_size` photographs at once."""
    device, _ = choose_device(options.device)
    return choose_runtime(options, find(device, Case.of_inference(model.config, batch_size, options)))
