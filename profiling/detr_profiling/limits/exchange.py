"""Data-parallel training on paper: what the exchange of gradients takes, and how much of it the backward pass hides;
and what it takes to plan the order of all GPUs' images.

An all-reduce is a ring's: reduce-scatter and all-gather, in each of which every GPU sends and receives (n-1)/n of the
bytes in n-1 steps (Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH").
Of several machines each reduce-scatters within, then every GPU all-reduces its share with its fellows on the others,
then each all-gathers within. Between m machines the bytes are a ring's too, but the steps those of a tree, 2 log2(m),
as NCCL takes for many. Gradients are exchanged in buckets, one after another, each as soon as its last gradient is
there (Li et al. 2020, "PyTorch Distributed", 3.2), or all at once after the backward pass, as by a captured step.

Every process plans for all, as it has to know what the others take (data/sampler.py). It does so in a thread of its
own, some 256 steps ahead, so that a step waits only where planning takes longer than steps do. In the thread that
launches steps, and image by image, it would be added to each of them: 27 us an image, so with 64 GPUs of 16 images 27.6
ms a step.

Left out: that an exchange takes multiprocessors and memory bandwidth from what runs beside it, that the slowest of many
GPUs holds up the others, and the reading of images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from detr_fast.config import require


@dataclass(frozen=True, kw_only=True)
class Links:
    """Between GPUs; defaults are those of HGX H100 and H200."""

    gpus_a_machine: int = 8
    """GPUs that are connected within a machine."""
    within_gb_s: float = 450
    """From each GPU to the others of its machine, one way: NVLink 4, 18 links of 25 GB/s."""
    between_gb_s: float = 50
    """From each GPU to other machines, one way: a network card of 400 Gb/s for each."""
    reached: float = 0.8
    """Share of both that large messages reach; of NVLink 4 people measure 376 to 380 GB/s (NVIDIA/nccl#1264)."""
    within_us: float = 3.4
    """Latency of a step within a machine: NCCL's own estimate (src/graph/tuning.cc: NVLink, ring, Simple)."""
    between_us: float = 14
    """Of one between machines: the same (network, tree, Simple)."""

    def __post_init__(self) -> None:
        require(self.gpus_a_machine >= 1, f"--gpus-a-machine {self.gpus_a_machine}: at least 1.")
        require(self.within_gb_s > 0 and self.between_gb_s > 0, "--within-gb-s and --between-gb-s must be positive.")
        require(0 < self.reached <= 1, f"--reached {self.reached}: a share above 0, at most 1.")
        require(self.within_us >= 0 and self.between_us >= 0, "--within-us and --between-us cannot be negative.")

    def machines(self, gpus: int) -> int:
        return -(-gpus // self.gpus_a_machine)

    def all_reduce_ms(self, gpus: int, nbytes: float) -> float:
        """Of `nbytes` on each of `gpus`, which fill their machines."""
        machines = self.machines(gpus)
        inside = gpus // machines
        within_bytes = 2 * (inside - 1) / inside * nbytes
        between_bytes = 2 * (machines - 1) / machines * nbytes / inside
        moving_ms = (within_bytes / self.within_gb_s + between_bytes / self.between_gb_s) / self.reached / 1e6
        within_steps, between_steps = 2 * (inside - 1), 2 * math.ceil(math.log2(machines))
        return moving_ms + (within_steps * self.within_us + between_steps * self.between_us) / 1e3


@dataclass(frozen=True)
class Step:
    """A training step on one GPU."""

    ms: float
    backward_ms: float
    """The part of it in which gradients come."""
    images: int
    gradient_bytes: int


@dataclass(frozen=True)
class Scaled:
    """The same step on several GPUs."""

    gpus: int
    machines: int
    exchange: str
    exchange_ms: float
    """Of the gradients and of the losses' normalizers."""
    exposed_ms: float
    """What of that is not hidden behind the backward pass."""
    planning_ms: float
    """Of a thread beside the step, for the order of all GPUs' images."""
    step_ms: float
    images_per_second: float
    efficiency: float
    """Images a second over those of as many single GPUs."""


PLANNING_US = 0.3
"""For each image of all GPUs, on one core: `pytest benchmarks/bench_data.py -k order`."""
NORMALIZER_BYTES = 8
"""Two float32, exchanged before the losses: nothing but latency, and never hidden."""


def scaled(step: Step, gpus: int, links: Links, bucket_bytes: float | None, planning_us: float = PLANNING_US) -> Scaled:
    """Return `step` on `gpus`; gradients in buckets of at most `bucket_bytes`, or with None all after the backward
    pass."""

    def exchange_ms(nbytes: float) -> float:
        return links.all_reduce_ms(gpus, nbytes)

    count = 1 if bucket_bytes is None else math.ceil(step.gradient_bytes / bucket_bytes)
    gradients_ms, normalizers_ms = count * exchange_ms(step.gradient_bytes / count), exchange_ms(NORMALIZER_BYTES)
    exposed_ms = normalizers_ms + not_hidden_ms(step, count, exchange_ms)
    planning_ms = planning_us * step.images * gpus / 1e3
    ms = max(step.ms + exposed_ms, planning_ms)
    kind = "none" if gpus == 1 else "afterwards" if bucket_bytes is None else "in buckets"
    return Scaled(
        gpus,
        links.machines(gpus),
        kind,
        gradients_ms + normalizers_ms,
        exposed_ms,
        planning_ms,
        ms,
        1e3 * gpus * step.images / ms,
        step.ms / ms,
    )


def not_hidden_ms(step: Step, buckets: int, exchange_ms: Callable[[float], float]) -> float:
    """How long the exchange of `buckets` of one size goes on after the backward pass, over which their gradients come
    evenly."""
    ends_ms = 0.0
    for number in range(1, buckets + 1):
        ends_ms = max(ends_ms, step.backward_ms * number / buckets) + exchange_ms(step.gradient_bytes / buckets)
    return ends_ms - step.backward_ms
