"""Measurement of how fast training images are read: `python -m detr_fast.train --data-only`."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from detr_fast.config import ModelConfig
from detr_fast.console import Console
from detr_fast.data.batch import Batch
from detr_fast.preprocessing import Preprocessing
from detr_fast.runtime import Runtime
from detr_fast.training.metrics_log import read_rows

WARM_UP_BATCHES = 2
SECONDS = 10.0
"""Read for this long, each way."""


def training_rate(metrics: Path, processes: int) -> float | None:
    """Return each device's images/s by an earlier run's log, without waits for data; None where there is none."""
    rows = [row for row in read_rows(metrics) if row["kind"] == "train"]
    busy = [float(row["images_per_second"]) / max(1 - float(row["data_wait_fraction"]), 1e-3) for row in rows]
    return median(busy) / processes if busy else None


def measure_data(
    batches: Iterator[Batch],
    config: ModelConfig,
    runtime: Runtime,
    workers: int | None,
    console: Console,
    wanted: float | None = None,
) -> None:
    """Print images/s read, and read and preprocessed on the device, with the padding overhead.

    `wanted`: images/s of training, where they are known, to compare with.
    """
    readers = runtime.workers(workers)
    cores = f"{readers} workers" if readers else "this process alone"

    preprocessing = Preprocessing(config.image_mean, config.image_std, runtime.channels_last, runtime.dtype)

    def prepare(batch: Batch) -> None:
        preprocessing(batch)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    for name, use in (("read", lambda batch: None), ("read and prepared", prepare)):
        for _ in range(WARM_UP_BATCHES):
            use(next(batches))
        images, overheads, began = 0, [], time.perf_counter()
        while (elapsed := time.perf_counter() - began) < SECONDS:
            batch = next(batches)
            use(batch)
            images += len(batch.image_ids)
            overheads.append(batch.padding_overhead)
        rate = images / elapsed
        console.print(
            f"{name:>18}  {rate:.0f} images/s ({cores}; {rate / max(readers, 1):.0f} a core), "
            f"padding overhead {sum(overheads) / len(overheads):.1%}"
        )
    if wanted is not None:
        found = f"{wanted:.0f} images/s on this device, by the output folder's log: {verdict(rate, wanted)}"
        console.print(f"{'training':>18}  {found}")


def verdict(rate: float, wanted: float) -> str:
    return "reading keeps up" if rate >= wanted else "reading is slower: raise --workers"
