"""Several processes, and several accumulated batches, make the step of their joined batch."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from detr_fast.data.batch import Batch, collate
from detr_fast.training.distributed import World, share_buffers
from tests.factories import TINY, make_sample, make_step, run_processes

CONFIG = replace(TINY, num_queries=8)
TARGET_COUNTS = (3, 0, 10, 1)
"""Objects in each of four images; none, and more than there are queries, are among them."""


def batch(*indices: int) -> Batch:
    return collate([make_sample(index, objects=TARGET_COUNTS[index]) for index in indices])


def run_step(batches_of_steps: list[list[Batch]], world: World | None = None, muon: bool = False) -> dict[str, Any]:
    """Steps in evaluation mode, where no image's batch norm depends on another: the last one's loss and gradients."""
    step = make_step(CONFIG, world=world, clip=0.0, muon=muon)
    model = step.model.eval()
    for batches in batches_of_steps:
        terms = step(batches)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    statistics = next(model.buffers()).fill_(step.world.rank)
    share_buffers(step.model, step.world)
    return {"statistics": statistics, "loss": terms["loss"], "norm": terms["grad_norm"], "gradients": gradients}


def one_step_and_two(world: World, muon: bool = False) -> list[dict[str, Any]]:
    """Of this rank's part of four images, with the loss of all ranks."""
    own = range(4)[world.rank * 4 // world.size : (world.rank + 1) * 4 // world.size]
    results = [run_step([[batch(index) for index in own]] * steps, world, muon) for steps in (1, 2)]
    return [result | {"loss": world.sum(result["loss"].clone()) / world.size} for result in results]


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-5)
    assert one["norm"].item() == pytest.approx(other["norm"].item(), rel=1e-4)
    for name, gradient in one["gradients"].items():
        scale = max(gradient.norm().item(), 1e-3 * one["norm"].item())
        assert (gradient - other["gradients"][name]).norm().item() < 1e-3 * scale, name


def test_accumulated_batches_make_the_joined_batch() -> None:
    """Different counts of targets: a mean of means would weigh the images differently."""
    require_same(run_step([[batch(0, 1, 2, 3)]]), run_step([[batch(0, 1), batch(2, 3)]]))


@pytest.mark.parametrize(("size", "muon"), [(2, False), (4, False), (2, True)])
def test_processes_make_the_joined_batch(size: int, muon: bool, tmp_path: Path) -> None:
    """Of two, each accumulates two batches. The second step's loss shows that the first's update was the same too."""
    joined = [[batch(0, 1, 2, 3)]]
    once, twice = run_step(joined, muon=muon), run_step(joined * 2, muon=muon)
    for first, second in run_processes(partial(one_step_and_two, muon=muon), size, tmp_path):
        require_same(once, first)
        assert first["statistics"].count_nonzero() == 0  # the main one's, on all
        assert second["loss"].item() == pytest.approx(twice["loss"].item(), rel=1e-4)
    assert twice["loss"].item() != pytest.approx(once["loss"].item(), rel=1e-4)
