"""Small samples, batches, training steps and worlds of processes, as several test files need them."""

import copy
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from detr_fast.config import MODELS, ModelConfig
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.detector import place
from detr_fast.model.detr import DETR
from detr_fast.model.query_sets import QuerySets
from detr_fast.options import RuntimeOptions, TrainOptions
from detr_fast.runtime import Runtime, choose_runtime
from detr_fast.training.build import make_data
from detr_fast.training.checkpoint import Progress, TrainingState
from detr_fast.training.criterion import build_criterion
from detr_fast.training.distributed import World, joined_world
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.recipes import RECIPES
from detr_fast.training.resuming import digests
from detr_fast.training.step import LayerwiseNetwork, TrainStep

PROPOSING: dict[str, Any] = {
    **{"queries": "encoder", "query_positions": "boxes", "box_refinement": True, "layer_heads": True},
    **{"scores": "sigmoid", "token_norm": True, "position_temperature": 20.0},
    "size_divisible": 32,
}
"""`detr_lite`'s decoder, for a network of any backbone."""
TINY = replace(MODELS["detr_tiny"], encoder_layers=1, decoder_layers=2)
"""The smallest DETR that has auxiliary losses."""
NARROW = replace(
    MODELS["detr_r50"],
    hidden_dim=32,
    num_heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward_dim=64,
    num_queries=7,
    num_classes=5,
    dropout=0.0,
)
"""DETR of a ResNet with frozen norms, for Triton's interpreter with the fixture `one_narrow_block_a_stage`."""


def make_sample(seed: int, size: tuple[int, int] = (64, 64), objects: int = 2) -> Sample:
    """Draw an image of `size`, (height, width), with boxes of any of detr_tiny's classes; its id is the seed."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    boxes = torch.rand(objects, 4, generator=generator) * 0.3 + 0.2
    labels = torch.randint(0, TINY.num_classes, (objects,), generator=generator)
    return Sample(image, labels, boxes, seed, size, size)


def make_batch(sizes: Sequence[tuple[int, int]], counts: Sequence[int], seed: int = 0) -> Batch:
    """Join samples of these sizes with so many objects each."""
    return collate([make_sample(seed + i, *each) for i, each in enumerate(zip(sizes, counts, strict=True))])


def make_step(
    config: ModelConfig = TINY,
    runtime: Runtime | None = None,
    *,
    decay: float = 0.0,
    world: World | None = None,
    learning_rate: float = 1e-4,
    clip: float = 0.1,
    groups: int = 1,
    denoising: int = 0,
    muon: bool = False,
) -> TrainStep:
    """Make the training step of a new model, always with the same weights; by itself, on a CPU in fp32."""
    torch.manual_seed(0)
    runtime = runtime or choose_runtime(RuntimeOptions(device="cpu", precision="fp32"))
    model = place(DETR(config), runtime).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False) if decay else None
    sets = QuerySets(config, groups, denoising) if groups > 1 or denoising else None
    optimizer = build_optimizer(LayerwiseNetwork(model, sets), learning_rate, learning_rate, 1e-4, muon)
    criterion = build_criterion(config.num_classes, scores=config.scores)
    return TrainStep(model, criterion, optimizer, runtime, world or World(), clip, ema, decay, sets)


def run_processes(run: Callable[[World], Any], count: int, folder: Path) -> list[Any]:
    """Join `count` processes on this CPU, call `run` with each one's world and return the results in order of rank.

    `run` is a function of a module; what it returns is kept in `folder` as torch saves it. The processes are forks of
    one that has imported what they need, and has run nothing.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "detr_fast.train"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(_one_process, (run, count, port, folder), count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _one_process(rank: int, run: Callable[[World], Any], count: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": str(rank)}
    torch.set_num_threads(1)
    with joined_world(torch.device("cpu")) as world:
        torch.save(run(world), folder / f"{rank}.pt")


def begun(root: Path, **options: Any) -> TrainOptions:
    small = {"data": str(root), "batch_size": 8, "accumulate": 1, "epochs": 1, "device": "cpu", "warmup_steps": 2}
    return RECIPES["tiny"].but(**(small | options))


def state_of(options: TrainOptions, processes: int = 1) -> TrainingState:
    """Makes what last.pt holds after three steps, without weights and moments."""
    train_set, val_set, config = make_data(options)
    return TrainingState(
        model_config=config,
        categories=train_set.categories,
        options=options,
        data=digests(train_set, val_set),
        processes=processes,
        progress=Progress(step=3),
        **{"model": {}, "ema": None, "optimizer": {}, "scaler": {}},
    )
