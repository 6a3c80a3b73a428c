"""How fast training images are read: `python -m detr_fast.train --data-only`."""

import time
from collections.abc import Iterator

import torch
from rich.console import Console

from detr_fast.config import ModelConfig
from detr_fast.data.batching import Batch, model_input
from detr_fast.runtime import Runtime

WARM_UP_BATCHES = 2
SECONDS = 10.0
"""Read for this long, each way."""


def measure_data(
    batches: Iterator[Batch], config: ModelConfig, runtime: Runtime, workers: int | None, console: Console
) -> None:
    """Prints images a second as read, and as read and made a model's input on the device, and the padding."""
    readers = runtime.workers(workers)
    cores = f"{readers} workers" if readers else "this process alone"

    def prepare(batch: Batch) -> None:
        model_input(batch, config.image_mean, config.image_std, runtime.channels_last, runtime.dtype)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    for name, use in (("read", lambda batch: None), ("read and prepared", prepare)):
        for _ in range(WARM_UP_BATCHES):
            use(next(batches))
        images, padding, began = 0, [], time.perf_counter()
        while (elapsed := time.perf_counter() - began) < SECONDS:
            batch = next(batches)
            use(batch)
            images += len(batch.image_ids)
            padding.append(batch.padding)
        rate = images / elapsed
        console.print(
            f"{name:>18}  {rate:.0f} images/s ({cores}; {rate / max(readers, 1):.0f} a core), "
            f"{sum(padding) / len(padding):.3f} pixels computed for each that is an image's",
            highlight=False,
            soft_wrap=True,
        )
