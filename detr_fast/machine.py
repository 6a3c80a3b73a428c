"""Description of this machine, as far as times depend on it: device, driver, versions, and the code that computes."""

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import detr_kernels
import torch

COMPUTING = ("torch", "torchvision", "triton", "xformers")
"""Packages whose version an entry depends on."""


def environment(device: torch.device) -> dict[str, Any]:
    """Describe what times on `device` depend on besides the model: name, driver, libraries; a CPU's cores."""
    installed = {**{name: installed_version(name) for name in COMPUTING}, "code": code_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30),
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **installed,
        }
    capabilities = torch.cpu.get_capabilities().items()
    instructions = sorted(name for name, there in capabilities if there is True and name.startswith(("avx", "amx")))
    return {"device": processor_name(), "cores": cores(), "instructions": " ".join(instructions), **installed}


def code_version() -> str:
    """Hash the files that compute: what was measured is void once one of them changes."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in computing_files())).hexdigest()[:12]


def computing_files() -> list[Path]:
    """List the files of the kernels, the network and the training step, those in subfolders too."""
    folders = (Path(detr_kernels.__file__).parent, Path(__file__).parent / "model", Path(__file__).parent / "training")
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def cores() -> int:
    """Count the processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Ask NVML for the driver's version; None where it does not say."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def processor_name() -> str:
    """Read the processor's name from Linux; elsewhere return the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
