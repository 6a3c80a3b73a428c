"""An update has the recipe's number of images on any devices, unless another is asked for, and says so."""

import os
from dataclasses import replace

import pytest
import torch

from detr_fast.config import MODELS, UserError
from detr_fast.options import RuntimeOptions, TrainOptions
from detr_fast.runtime import MOST_WORKERS, choose_runtime
from detr_fast.training.batch_size import batch_line, lr_factor, with_batches
from detr_fast.training.recipes import RECIPES

R50, TINY = TrainOptions(), RECIPES["tiny"]
PLENTY = 100_000


def batches(options: TrainOptions, device: str, processes: int, images: int = PLENTY) -> tuple[int, int]:
    chosen = with_batches(options, MODELS[options.network.model], device, processes, images).optimizer
    return chosen.batch_size, chosen.accumulate


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("options", [R50, TINY.but(max_size=64)])
def test_an_update_has_the_recipes_16_images_whatever_the_devices(
    options: TrainOptions, processes: int, device: str
) -> None:
    batch_size, accumulate = batches(options, device, processes)
    assert batch_size * accumulate * processes == 16
    chosen = with_batches(options, MODELS[options.network.model], device, processes, PLENTY).optimizer
    assert lr_factor(chosen, processes) == 1 and "recipe" not in batch_line(chosen, processes, 1)


def test_batches_are_as_large_as_one_device_takes() -> None:
    assert batches(R50, "cuda", 1) == (16, 1) and batches(R50, "cuda", 8) == (2, 1)
    assert batches(R50, "cpu", 1) == (2, 8) and batches(TINY, "cpu", 1) == (16, 1)
    assert batches(R50.but(effective_batch=256), "cuda", 1) == (32, 8)
    assert batches(R50, "cuda", 1, images=10) == (8, 2)


def test_a_batch_size_that_is_given_is_used_as_it_is() -> None:
    for processes in (1, 3, 64):
        assert batches(R50.but(batch_size=5), "cuda", processes) == (5, 1)
        assert batches(R50.but(batch_size=5, accumulate=3), "cpu", processes) == (5, 3)
    assert batches(R50.but(batch_size=5, effective_batch=30), "cuda", 2) == (5, 3)
    assert batches(R50.but(accumulate=4), "cuda", 2) == (2, 4)


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        (R50, 3),
        (R50, 32),
        (R50.but(batch_size=3, effective_batch=16), 1),
        (R50.but(batch_size=4, accumulate=2, effective_batch=16), 1),
        (R50.but(accumulate=32), 1),
        (with_batches(R50, MODELS["detr_r50"], "cuda", 8, PLENTY), 4),  # a run resumed on fewer devices
    ],
)
def test_what_cannot_be_shared_evenly_is_refused(options: TrainOptions, processes: int) -> None:
    with pytest.raises(UserError, match="--effective-batch that is a multiple of"):
        batches(options, "cuda", processes)


def test_learning_rates_follow_the_effective_batch_only_where_asked() -> None:
    larger = with_batches(R50.but(effective_batch=64), MODELS["detr_r50"], "cuda", 2, PLENTY).optimizer
    assert lr_factor(larger, 2) == 1
    assert batch_line(larger, 2, 4) == (
        "32 x 1 accumulated x 2 processes = 64 images a step, each batch in 4 micro-batches to fit into the memory, "
        "the recipe has 16: learning rates are not scaled"
    )
    scaled = replace(larger, scale_lr=True)
    assert lr_factor(scaled, 2) == 4 and batch_line(scaled, 2, 1).endswith("learning rates are times 4")


def test_images_are_read_by_as_many_processes_as_cores_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    here = choose_runtime(RuntimeOptions(device="cpu"))
    beside_a_gpu = replace(here, device=torch.device("cuda"))
    assert here.workers(None) == 0 and here.workers(3) == beside_a_gpu.workers(3) == 3
    for cores, local_ranks, workers in ((8, 1, 7), (8, 2, 3), (1, 1, 1), (8, 8, 1), (224, 8, MOST_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        assert beside_a_gpu.workers(None) == workers


@pytest.mark.parametrize(("images", "epochs", "update"), [(4, 1, 4), (4, 300, 16), (7, 1, 7), (6, 3, 16), (3, 2, 6)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_of_few_images_has_at_least_one_update(images: int, epochs: int, update: int, device: str) -> None:
    options = R50.but(epochs=epochs)
    chosen = with_batches(options, MODELS["detr_r50"], device, 1, images).optimizer
    assert chosen.effective_batch == chosen.batch_size * chosen.accumulate <= update
    assert epochs * (images // chosen.batch_size) // chosen.accumulate >= 1
    assert chosen.effective_batch > update // 2
