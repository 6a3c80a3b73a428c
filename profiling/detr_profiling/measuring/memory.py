"""The most memory that a piece of work needs: the allocator's on a GPU, the process's on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    mib: float = float("nan")
    """Known when the context has ended; NaN on a CPU whose kernel keeps no peak."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak within it: what the CUDA allocator has handed out, or the resident set of the whole process."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.mib = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        restart_resident_peak()
        yield peak
        peak.mib = resident_peak_mib()


def restart_resident_peak() -> None:
    """Make Linux count the process's peak anew; where that is refused, it goes on from the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_peak_mib() -> float:
    """Read the largest resident set since the last restart, NaN where /proc does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    peak = next((line for line in lines if line.startswith("VmHWM:")), None)
    return int(peak.split()[1]) / 2**10 if peak else float("nan")
