"""Sums of a step's terms on the device, read by the host only when a log line is due."""

import resource
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detr_fast.training.distributed import World


@dataclass
class TermSums:
    """Sums a step's terms, always in the same memory, so that a captured step adds them too."""

    sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """Sums (N,) float32 by the names of the N terms that are added together."""

    def add(self, terms: dict[str, Tensor]) -> None:
        names, values = tuple(terms), torch.stack([value.float() for value in terms.values()])
        if names in self.sums:
            self.sums[names].add_(values)
        else:
            self.sums[names] = values

    def read(self) -> tuple[list[str], Tensor]:
        """Return the terms' names, and a copy of their sums (N,)."""
        return [name for names in self.sums for name in names], torch.cat(list(self.sums.values()))

    def clear(self) -> None:
        for each in self.sums.values():
            each.zero_()


@dataclass
class Meter:
    """Measures between two readings: means of a step's terms, images/s, and the fraction of time spent on data."""

    device: torch.device
    world: World
    terms: TermSums
    steps: int = 0
    images: int = 0
    wait_seconds: float = 0.0
    padding_overhead: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, images: int, wait_seconds: float, padding_overhead: float = 0.0) -> None:
        """Count one step. `padding_overhead`: pixels of padding as a fraction of the images' own."""
        self.steps += 1
        self.images += images
        self.wait_seconds += wait_seconds
        self.padding_overhead += padding_overhead

    def read(self) -> dict[str, float]:
        """Return means over steps and ranks and rates since the last reading, and start anew. Waits for the device."""
        names, sums = self.terms.read()
        means = self.world.sum(sums) / (self.steps * self.world.size)
        values = dict(zip(names, means.tolist(), strict=True))
        elapsed = time.perf_counter() - self.started
        values |= {
            "images_per_second": self.images * self.world.size / elapsed,
            "data_wait_fraction": self.wait_seconds / elapsed,
            "padding_overhead": self.padding_overhead / self.steps,
            "memory_mib": peak_memory_mib(self.device),
        }
        self.restart()
        return values

    def restart(self) -> None:
        """Forget what was added, and the time gone by."""
        self.terms.clear()
        self.steps, self.images, self.wait_seconds, self.padding_overhead = 0, 0, 0.0, 0.0
        self.started = time.perf_counter()


def peak_memory_mib(device: torch.device) -> float:
    """Return the most that the GPU's allocator, or on a CPU the process, has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
