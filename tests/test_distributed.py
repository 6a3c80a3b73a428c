"""Several processes, and several accumulated batches, make the step of their joined batch."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from detr_fast.config import MODELS
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.detector import place
from detr_fast.model.detr import DETR
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.training.criterion import build_criterion
from detr_fast.training.distributed import World, joined_world, share_buffers
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep

CONFIG = replace(MODELS["detr_tiny"], num_queries=8)
TARGET_COUNTS = (3, 0, 10, 1)
"""Of four images: none, and more than there are queries, among them."""


def sample(index: int) -> Sample:
    generator = torch.Generator().manual_seed(index)
    count = TARGET_COUNTS[index]
    boxes = torch.rand(count, 4, generator=generator) * 0.3 + 0.2
    labels = torch.randint(0, CONFIG.num_classes, (count,), generator=generator)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    return Sample(image, labels, boxes, image_id=index, original_size=(64, 64), size=(64, 64))


def batch(*indices: int) -> Batch:
    return collate([sample(index) for index in indices])


def run_step(windows: list[list[Batch]], world: World | None = None) -> dict[str, Any]:
    """Steps in evaluation mode, where no image's batch norm depends on another: the last one's loss and gradients."""
    torch.manual_seed(0)
    runtime = choose_runtime(RuntimeOptions(device="cpu", precision="fp32"))
    model = place(DETR(CONFIG), runtime).eval()
    optimizer = build_optimizer(model, 1e-4, 1e-4, 1e-4)
    step = TrainStep(model, build_criterion(CONFIG.num_classes), optimizer, runtime, world or World(), clip=0.0)
    for window in windows:
        terms = step(window)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    statistics = next(model.buffers()).fill_(step.world.rank)
    share_buffers(step.model, step.world)
    return {"statistics": statistics, "loss": terms["loss"], "norm": terms["grad_norm"], "gradients": gradients}


def one_of_several(rank: int, size: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "RANK": str(rank)}
    torch.set_num_threads(1)
    own = range(4)[rank * 4 // size : (rank + 1) * 4 // size]
    with joined_world(torch.device("cpu")) as world:
        window = [batch(index) for index in own]
        for steps in (1, 2):
            result = run_step([window] * steps, world)
            loss = world.sum(result["loss"].clone()) / world.size
            torch.save(result | {"loss": loss}, Path(folder) / f"{rank}-{steps}.pt")


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-5)
    assert one["norm"].item() == pytest.approx(other["norm"].item(), rel=1e-4)
    for name, gradient in one["gradients"].items():
        scale = max(gradient.norm().item(), 1e-3 * one["norm"].item())
        assert (gradient - other["gradients"][name]).norm().item() < 1e-3 * scale, name


def test_accumulated_batches_make_the_joined_batch() -> None:
    """Different counts of targets: a mean of means would weigh the images differently."""
    require_same(run_step([[batch(0, 1, 2, 3)]]), run_step([[batch(0, 1), batch(2, 3)]]))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_make_the_joined_batch(size: int, tmp_path: Path) -> None:
    """Of two, each accumulates two batches. The second step's loss shows that the first's update was the same too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(one_of_several, (size, port, str(tmp_path)), nprocs=size)
    joined = [[batch(0, 1, 2, 3)]]
    once, twice = run_step(joined), run_step(joined * 2)
    for rank in range(size):
        require_same(once, torch.load(tmp_path / f"{rank}-1.pt"))
        assert torch.load(tmp_path / f"{rank}-1.pt")["statistics"].count_nonzero() == 0  # the main one's, on all
        assert torch.load(tmp_path / f"{rank}-2.pt")["loss"].item() == pytest.approx(twice["loss"].item(), rel=1e-4)
    assert twice["loss"].item() != pytest.approx(once["loss"].item(), rel=1e-4)
