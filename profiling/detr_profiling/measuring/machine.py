"""The machine that a measurement was made on: without it no figure means anything.

torch.utils.collect_env knows less of it, as text, and asks pip, lscpu and nvidia-smi for seconds: this is read after
every measurement.
"""

import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from detr_fast.machine import cores, driver_version, installed_version, processor_name
from detr_profiling.measuring.nvml import find_handle

PACKAGES = ("torch", "torchvision", "triton", "xformers", "transformers", "numpy")


@dataclass(frozen=True)
class Machine:
    """Holds hardware, versions and the commit; None: not there, or not known."""

    device: str
    """The GPU's name, or the processor's."""
    processor: str
    cores: int
    """That this process may run on."""
    threads: int
    """Threads of torch's operators on the CPU."""
    memory_gib: float
    """The host's."""
    capabilities: str
    """Vector instructions of the CPU, or the GPU's compute capability."""
    gpu_memory_gib: float | None
    power_limit_watts: float | None
    driver: str | None
    cuda: str | None
    python: str
    versions: dict[str, str | None]
    commit: str | None
    """Short hash of the checkout, with + where it has changes."""
    date: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine, as torch will use it on `device`."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    driver, power_limit_watts = gpu_facts(device)
    return Machine(
        device=gpu.name if gpu else processor_name(),
        processor=processor_name(),
        cores=cores(),
        threads=torch.get_num_threads(),
        memory_gib=round(pages * page_bytes / 2**30, 1),
        capabilities=f"sm_{gpu.major}{gpu.minor}" if gpu else torch.backends.cpu.get_cpu_capability(),
        gpu_memory_gib=round(gpu.total_memory / 2**30, 1) if gpu else None,
        power_limit_watts=power_limit_watts,
        driver=driver,
        cuda=torch.version.cuda if gpu else None,
        python=platform.python_version(),
        versions={name: installed_version(name) for name in PACKAGES},
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )


def gpu_facts(device: torch.device) -> tuple[str | None, float | None]:
    """Ask the driver for its version and the power limit in watts."""
    driver = driver_version() if device.type == "cuda" else None
    if driver is None:
        return None, None
    import pynvml

    try:
        return driver, pynvml.nvmlDeviceGetEnforcedPowerLimit(find_handle(pynvml, device)) / 1e3
    except pynvml.NVMLError:
        return driver, None


def commit() -> str | None:
    """Name the commit of the checkout that this file is in.

    DETR_FAST_COMMIT names it where the files came without git.
    """
    if named := os.environ.get("DETR_FAST_COMMIT"):
        return named
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
