"""What each kernel is worth inside a whole training step: `pytest benchmarks/bench_forms.py --benchmark-only`.

DETR-R50 in bf16, all operations in their plain form but one, eager and compiled. A form that loses here is not the
default, whatever it wins alone. A step's loss must be the plain step's, or no time is reported. On a CPU, where Triton
does not run, one small step in DETR's own order of operations is timed against the default.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from detr_fast.config import MODELS, RuntimeOptions
from detr_fast.data.batching import Batch
from detr_fast.data.targets import Targets
from detr_fast.model.detr import DETR
from detr_fast.model.implementation import Implementation
from detr_fast.runtime import choose_runtime
from detr_fast.training.criterion import build_criterion
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep

CUDA = torch.cuda.is_available()
IMAGES, HEIGHT, WIDTH, TARGETS = (16, 800, 1066, 20) if CUDA else (1, 224, 320, 5)
CONFIG = replace(MODELS["detr_r50"], dropout=0.0)  # so that losses can be compared

ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "xformers": {"attention": "xformers"},
    "triton-attention": {"attention": "triton"},
    "triton-convolution": {"convolution": "triton"},
    "cudnn-convolution": {"convolution": "cudnn"},
    "triton-layer-norm": {"layer_norm": "triton"},
    "triton-pixels": {"pixels": "triton"},
    "triton-match-cost": {"match_cost": "triton"},
    "triton-set-loss": {"set_loss": "triton"},
    "scipy": {"assignment": "scipy"},
}
OURS = {"layer_norm": "triton", "pixels": "triton", "match_cost": "triton", "set_loss": "triton"}
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "ref": {"attention": "ref", "folded": False}}
if CUDA:
    FORMS |= ONE_BY_ONE | {"all": OURS | {"attention": "xformers", "convolution": "triton"}}


def make_batch() -> Batch:
    """Random pixels and boxes; the second half of the images is a little narrower."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    sizes = torch.tensor([[HEIGHT, WIDTH - 64 * (index * 2 >= max(IMAGES, 2))] for index in range(IMAGES)])
    boxes = torch.rand(IMAGES, TARGETS, 4, generator=generator) * 0.3 + 0.2
    labels = torch.randint(CONFIG.num_classes, (IMAGES, TARGETS), generator=generator)
    counts = torch.randint(1, TARGETS + 1, (IMAGES,), generator=generator)
    return Batch(images, sizes, True, Targets(labels, boxes, counts), list(range(IMAGES)), sizes)


def make_step(form: str, compiled: bool) -> TrainStep:
    torch.manual_seed(0)
    runtime = choose_runtime(RuntimeOptions(precision="bf16", attention="sdpa", compile=compiled))
    model = runtime.place(DETR(CONFIG)).train()
    implementation: Implementation = replace(model.implementation, **FORMS[form])
    implementation.apply_to(model)
    return TrainStep(model, build_criterion(CONFIG.num_classes), build_optimizer(model, 1e-4, 1e-5, 1e-4), runtime)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch().to("cuda" if CUDA else "cpu")


@pytest.fixture(scope="module")
def plain_losses(batch: Batch) -> list[float]:
    step = make_step("plain", compiled=False)
    return [step([batch])["loss"].item() for _ in range(2)]


@pytest.mark.parametrize("compiled", [False, True] if CUDA else [False], ids=lambda on: "compiled" if on else "eager")
@pytest.mark.parametrize("form", FORMS)
def bench_form(benchmark: BenchmarkFixture, form: str, compiled: bool, batch: Batch, plain_losses: list[float]) -> None:
    step = make_step(form, compiled)
    losses = [step([batch])["loss"].item() for _ in range(2)]
    assert losses == pytest.approx(plain_losses, rel=2e-2)
    benchmark.extra_info |= {"images": IMAGES, "loss": losses, "plain loss": plain_losses}

    def run() -> None:
        step([batch])
        if CUDA:
            torch.cuda.synchronize()

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=20 if CUDA else 5, warmup_rounds=3 if CUDA else 1)
    if CUDA:
        benchmark.extra_info["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
