"""`python -m detr_fast.doctor`: what this machine has, what follows from it, and what to do about what is missing."""

import importlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from detr_kernels import why_not_xformers
from rich.table import Table

from detr_fast.command import run
from detr_fast.console import Console
from detr_fast.machine import cores
from detr_fast.paths import cache_folder
from detr_fast.runtime import missing_for_compile, multiplies_bf16
from detr_fast.tuning import Case, entries_of

INSTALL = "make setup, or pip install -c constraints.txt -e ."
FREE_GIB = 5
"""A run's two checkpoints, logs and pictures fit well into this."""


@dataclass(frozen=True)
class DoctorConfig:
    """Show what this machine has and what follows. There are no options."""


@dataclass(frozen=True)
class Finding:
    """One row of the table: subject, what is there, and what follows or what to do."""

    subject: str
    found: str
    follows: str = ""
    missing: bool = False


def check_python() -> Finding:
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def check_torch() -> Finding:
    if torch.version.cuda:
        return Finding("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}")
    return Finding("torch", f"{torch.__version__}, built without CUDA", "no GPU can be used", missing=True)


def check_gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", "none that torch can use", f"runs on the CPU: {why_no_gpu()}", missing=True)]
    findings = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory >> 30} GiB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding(f"GPU {index}", found, bf16_follows(torch.device("cuda", index))))
    return findings


def why_no_gpu() -> str:
    """Return what NVIDIA's driver says of GPUs that torch does not see."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return "cannot ask the driver without nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver ({error})"
    if not count:
        return "the driver finds no GPU"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it"
    return f"the driver ({driver}) may be too old for CUDA {torch.version.cuda}: update it"


def check_cpu() -> Finding:
    return Finding("CPU", f"{cores()} cores, {torch.get_num_threads()} threads", bf16_follows(torch.device("cpu")))


def bf16_follows(device: torch.device) -> str:
    return "--precision auto: " + ("bf16" if multiplies_bf16(device) else "fp32, for it has no bf16 products")


def check_compiler() -> Finding:
    name = os.environ.get("CXX", "g++")
    lacking = missing_for_compile()
    if lacking:
        return Finding(
            "C++ compiler", shutil.which(name) or f"no {name}", f"--compile cannot run: {lacking}", missing=True
        )
    about = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    return Finding("C++ compiler", next(iter(about.splitlines()), name), "--compile can run")


def check_package(name: str, serves: str, without: str) -> Finding:
    """Tell whether the package `name` imports; `serves` and `without` say what for, and what happens otherwise."""
    try:
        importlib.import_module(name)
        return Finding(name, version(name), serves)
    except ModuleNotFoundError:
        return Finding(name, "not installed", f"{without}: {INSTALL}", missing=True)
    except (ImportError, OSError, PackageNotFoundError) as error:
        return Finding(name, f"does not load: {error}", f"{without}: {INSTALL}", missing=True)


def check_xformers() -> Finding:
    """Tell whether xformers' FlashAttention, which calls torch's kernels, is there; its own extension need not load."""
    problem = why_not_xformers()
    if problem:
        return Finding("xformers", problem, f"--attention xformers cannot run: {INSTALL}", missing=True)
    return Finding(
        "xformers",
        f"{version('xformers')}, FlashAttention is there",
        "--attention xformers can run on a GPU in bf16 or fp16",
    )


def check_disk(folder: Path) -> Finding:
    free_gib = shutil.disk_usage(folder).free >> 30
    if free_gib < FREE_GIB:
        todo = f"a run may not fit: make room, or --output on another disk (advised: {FREE_GIB} GiB)"
        return Finding("disk", f"{free_gib} GiB free in {folder}", todo, missing=True)
    return Finding("disk", f"{free_gib} GiB free in {folder}")


def check_cache(folder: Path) -> Finding:
    """Tell whether the embedded data set can be written to `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK):
        todo = "the embedded data set cannot be kept: set DETR_FAST_CACHE to a writable folder"
        return Finding("cache", f"{folder} cannot be written", todo, missing=True)
    return Finding("cache", str(folder), "holds the embedded data set; safe to delete")


def check_measured() -> Finding:
    """List what `tune` has measured on this machine with what is installed now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = list(entries_of(device))
    if not entries:
        return Finding("measured", "nothing", "auto takes the first guess: python -m detr_profiling tune")
    gains = (f"{Case.from_dict(entry.case).text()}: {entry.summary()}" for entry in entries)
    return Finding("measured", f"{len(entries)} cases", "; ".join(gains))


def examine() -> list[Finding]:
    return [
        check_python(),
        check_torch(),
        *check_gpus(),
        check_cpu(),
        check_compiler(),
        check_package(
            "triton", "--compile and --kernels triton on a GPU", "neither --compile nor --kernels triton on a GPU"
        ),
        check_xformers(),
        check_package("hotcoco", "evaluates", "evaluation needs it"),
        check_disk(Path.cwd()),
        check_cache(cache_folder()),
        check_measured(),
    ]


def main(options: DoctorConfig) -> int:
    table = Table("", "found", "what follows", title="detr_fast on this machine", title_justify="left")
    for finding in examine():
        table.add_row(finding.subject, finding.found, finding.follows, style="yellow" if finding.missing else None)
    Console().print(table)
    return 0


if __name__ == "__main__":
    run(main, DoctorConfig)
