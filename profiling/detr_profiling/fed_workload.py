"""A training step on the batches of a data set as a workload: what `train` runs on it, from its recipe on."""

from collections.abc import Iterator
from typing import Any

import torch

from detr_fast.console import Console
from detr_fast.data.batch import Batch
from detr_fast.detector import place
from detr_fast.options import TrainOptions, TrainRuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.training.build import make_batches, make_data, make_model, make_step
from detr_fast.training.distributed import World
from detr_fast.training.recipes import recipe_of
from detr_profiling.workload import Workload, WorkloadOptions


class Feed:
    """Batches of a loader, one at a time: fetched, taken once, and not kept."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._batch: Batch | None = None

    def fetch(self) -> None:
        self._batch = next(self._batches)

    def take(self) -> Batch:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        return batch


def training_options(options: WorkloadOptions, data: str) -> TrainOptions:
    """Take the recipe of the model for `data`, from random weights; a --size bounds the shorter and the longer side."""
    resolved = options.resolved()
    runtime = resolved.runtime.to_dict()
    changes: dict[str, Any] = resolved.network.to_dict() | {
        "batch_size": resolved.batch_size,
        "buckets": resolved.mix.buckets,
        "seed": resolved.seed,
        **{name: runtime[name] for name in TrainRuntimeOptions.field_types() if name in runtime},
    }
    if options.size != "auto":
        shorter, longer = sorted(options.height_width)
        changes |= {"train_sizes": (shorter,), "crop_sizes": (), "image_size": shorter, "max_size": longer}
    return recipe_of(options.network.model, data).but(data=data, backbone_weights="none", **changes)


def build_fed_workload(options: WorkloadOptions, data: str) -> Workload:
    """Build a training step on the batches of `data`. Raises UserError for data that cannot be read."""
    config, resolved = training_options(options, data), options.resolved()
    torch.set_num_threads(resolved.runtime.threads or torch.get_num_threads())
    runtime, world = choose_runtime(config.runtime), World()
    train_set, _, architecture = make_data(config)
    model = place(make_model(architecture, config, train_set, None, Console()), runtime)
    step = make_step(model.train(), config, runtime, world, None)
    feed = Feed(make_batches(config, train_set, runtime, world, (0, 0)))
    asked = resolved.but(size=options.size)  # none where nobody asked for one: images are as the recipe makes them

    def run() -> Any:
        return step([feed.take()])

    return Workload("detr_fast", asked, model, run, reasons=runtime.reasons, fetch=feed.fetch, data=data)
