"""Choice of device, precision, memory order and switches, each with its reason, from options and hardware alone.

`detr_fast.detector.place` applies what was chosen.
"""

import os
import platform
import shutil
import sysconfig
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detr_kernels import OPERATIONS, Facts
from detr_kernels.launch import why_not_triton

from detr_fast.config import ModelConfig, require
from detr_fast.host_memory import Allocator, choose_host_allocator
from detr_fast.machine import cores
from detr_fast.options import Attention, Device, Kernels, Precision, RuntimeOptions
from detr_fast.tuning import RUNTIME_SWITCHES, Case, Measured, Mode, Tuning, find

MOST_WORKERS = 16
"""Processes that read images where none are asked for: they read more than a GPU trains on."""


@dataclass(frozen=True)
class Runtime:
    """The choices of one run; `reasons` has why each was made."""

    device: torch.device
    dtype: torch.dtype
    """GEMMs and convolutions are computed in it; float32 means no autocast."""
    channels_last: bool
    compile: bool
    kernels: Kernels
    attention: Attention
    reasons: dict[str, str]
    capture: bool | None = None
    """True: steps are replayed as CUDA graphs. None: optimised inference on a GPU is, training is not."""
    optimize: bool | None = None
    """True: inference folds and rounds weights once. None: it does, unless --kernels is ref."""
    measured: Measured = field(default_factory=dict)
    """Backends that are not asked for by name, but were measured to be fastest on this machine."""
    host_allocator: Allocator | None = None
    """The allocator of host memory, for the whole process; None: it stays as it is."""
    threads: int | None = None
    """Threads of torch's operators on a CPU, for the whole process; None: torch's default."""

    def workers(self, asked: int | None) -> int:
        """Return how many worker processes read images: as asked; else none on a CPU, and up to 16 beside a GPU.

        Beside a GPU they are this process's part of the machine's cores, less one, which launches kernels.
        """
        if asked is not None:
            return asked
        if self.device.type != "cuda":
            return 0
        own_cores = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun sets it
        return min(max(own_cores - 1, 1), MOST_WORKERS)

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to half precision, where it computes in that."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16))

    @property
    def optimizes(self) -> bool:
        """Tell whether inference folds and rounds weights once, instead of in every call."""
        return self.optimize if self.optimize is not None else self.kernels != "ref"


def choose_device(asked: Device) -> tuple[torch.device, str]:
    """Choose the device, with the reason. Raises UserError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    require(asked != "cuda" or available, "--device cuda: torch finds no GPU. Use --device cpu, or see doctor.")
    if asked == "auto":
        return (torch.device("cuda"), "a GPU is there") if available else (torch.device("cpu"), "no GPU found")
    return torch.device(asked), "asked for"


def choose_precision(asked: Precision, device: torch.device) -> tuple[torch.dtype, str]:
    """Choose the dtype of GEMMs and convolutions, with the reason. Raises UserError for fp16 on a CPU."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    require(asked != "fp16" or device.type == "cuda", "--precision fp16 needs a GPU. Use bf16 or fp32 on a CPU.")
    if asked != "auto":
        return names[asked], "asked for"
    if multiplies_bf16(device):
        return torch.bfloat16, "the hardware multiplies bf16"
    return torch.float32, "the hardware does not multiply bf16"


def multiplies_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def missing_for_compile() -> str | None:
    """Say what torch.compile lacks on a CPU, and Triton's launchers on a GPU, and how to get it; None if nothing."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        return f"there is no compiler {name}: sudo apt install g++, or set CXX to another one"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        package = ".".join(platform.python_version_tuple()[:2])
        return f"Python.h is missing: sudo apt install python{package}-dev"
    return None


def with_reasons(measured: Measured) -> dict[str, str]:
    """Format the choices as they are printed: "layer norm" -> "triton (measured here: ...)"."""
    words = {True: "yes", False: "no"}
    return {
        name.replace("_", " "): f"{words[value] if isinstance(value, bool) else value} ({reason})"
        for name, (value, reason) in measured.items()
    }


def why_not_measured(
    switch: str, value: Any, device: torch.device, dtype: torch.dtype, head_dim: int, mode: Mode = "training"
) -> str | None:
    """Say why a switch (an operation or an option) cannot have `value` here; None where no reason is known."""
    if switch in OPERATIONS:
        facts = Facts(device, dtype, training=mode == "training", dropout=0.1, head_dim=head_dim)
        return OPERATIONS[switch].why_not(value, facts)
    return missing_for_compile() if (switch, value) == ("compile", True) else None


def not_asked_for(options: RuntimeOptions, tuning: Tuning | None, device: torch.device) -> Measured:
    """Return what `tuning` measured for switches that `options` leave open, and that can run on `device`.

    With --no-tune or --kernels ref that is nothing.
    """
    if tuning is None or not options.tune or options.kernels == "ref":
        return {}
    closed = set(options.asked()) | ({"threads"} if "OMP_NUM_THREADS" in os.environ else set())
    if "kernels" in closed:
        closed |= {"optimize", *OPERATIONS}
    found = {name: each for name, each in tuning.measured().items() if name not in closed}
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
    """Choose what `options` ask for by name, else what `tuning` measured here, else a first guess.

    Raises UserError where something asked for by name cannot be had.
    """
    device, device_reason = choose_device(options.device)
    measured = not_asked_for(options, tuning, device)
    value = options.asked() | {name: found for name, (found, _) in measured.items()}
    dtype, precision_reason = choose_precision(value.get("precision", "auto"), device)
    host_allocator, allocator_reason = choose_host_allocator(options.host_allocator, device)
    compiled = value.get("compile", False)
    lacking = missing_for_compile() if compiled else None
    require(lacking is None, f"--compile cannot run: {lacking}. Or leave --compile out.")
    for option in ("kernels", "attention"):
        problem = why_not_triton(device) if getattr(options, option) == "triton" else None
        require(problem is None, f"--{option} triton cannot run: {problem}. Use --{option} auto.")
    reasons = {
        "device": f"{device} ({device_reason})",
        "precision": f"{str(dtype).removeprefix('torch.')} ({precision_reason})",
        "host allocator": f"{host_allocator or 'system'} ({allocator_reason})",
        **({"measured": tuning.summary()} if tuning and options.tune and options.kernels != "ref" else {}),
        **with_reasons({name: found for name, found in measured.items() if name in RUNTIME_SWITCHES}),
    }
    return Runtime(
        device,
        dtype,
        value.get("channels_last", True),
        compiled,
        options.kernels,
        options.attention,
        reasons,
        capture=value.get("capture"),
        optimize=value.get("optimize"),
        measured={name: found for name, found in measured.items() if name not in RUNTIME_SWITCHES},
        host_allocator=host_allocator,
        threads=value.get("threads") if device.type == "cpu" else None,
    )


def runtime_for_inference(options: RuntimeOptions, config: ModelConfig, batch_size: int) -> Runtime:
    """Choose as `choose_runtime`, with what was measured here for a model of `config` on `batch_size` images."""
    device, _ = choose_device(options.device)
    return choose_runtime(options, find(device, Case.of_inference(config, batch_size, options)))
