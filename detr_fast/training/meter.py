"""Sums of a step's terms on the device, read by the host only when a log line is due."""

import resource
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detr_fast.training.distributed import World


@dataclass
class Meter:
    """Adds up terms, images and the time spent waiting for data since the last reading."""

    device: torch.device
    world: World
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    images: int = 0
    wait_seconds: float = 0.0
    padding: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, terms: dict[str, Tensor], images: int, wait_seconds: float, padding: float = 1.0) -> None:
        """`padding`: pixels computed over pixels that are an image's."""
        self.steps += 1
        self.images += images
        self.wait_seconds += wait_seconds
        self.padding += padding
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def read(self) -> dict[str, float]:
        """Means over steps and ranks, rates over the time since the last reading; starts anew. Waits for the device."""
        names = list(self.sums)
        summed = self.world.sum(torch.stack([self.sums[name].float() for name in names]))
        values = dict(zip(names, (summed / (self.steps * self.world.size)).tolist(), strict=True))
        elapsed = time.perf_counter() - self.started
        values |= {
            "images_per_second": self.images * self.world.size / elapsed,
            "data_wait_share": self.wait_seconds / elapsed,
            "padding": self.padding / self.steps,
            "memory_mib": peak_memory_mib(self.device),
        }
        self.restart()
        return values

    def restart(self) -> None:
        """Forgets what was added, and the time gone by."""
        self.sums, self.steps, self.images, self.wait_seconds, self.padding = {}, 0, 0, 0.0, 0.0
        self.started = time.perf_counter()


def peak_memory_mib(device: torch.device) -> float:
    """The most that the GPU's allocator, or on a CPU the process, has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
