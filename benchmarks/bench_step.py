"""One training step of the main job, as it runs on this machine: `pytest benchmarks/ --benchmark-only`."""

from dataclasses import replace
from itertools import islice

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from detr_fast.config import Precision
from detr_fast.runtime import choose_runtime
from detr_fast.train import default_options
from detr_fast.training.assembly import make_batches, make_data, make_model, make_step
from detr_fast.training.distributed import World


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def bench_step(benchmark: BenchmarkFixture, precision: Precision, compiled: bool) -> None:
    """16 images of 64 pixels from the embedded data set; the loss is finite and falls, or no time is reported."""
    options = replace(default_options([]), precision=precision, compile=compiled)
    train_set, _, config = make_data(options)
    runtime = choose_runtime(options)
    model = runtime.place(make_model(config, options, train_set, None, Console(quiet=True))).train()
    step = make_step(model, options, runtime, World(), None)
    windows = [[batch] for batch in islice(make_batches(options, train_set, runtime, World(), (0, 0)), 20)]

    def run() -> list[float]:
        return [step(window)["loss"].item() for window in windows]

    first, again = run(), run()  # compiles, warms up
    assert sum(again) < sum(first)
    benchmark.extra_info["images"] = sum(len(batch.image_ids) for window in windows for batch in window)
    benchmark.pedantic(run, rounds=10)
