"""Matching and loss, forward and backward: `pytest benchmarks/bench_loss.py --benchmark-only`.

Ours, which takes all layers and images at once, the plain reference's and Hugging Face's, which go through them one by
one: six layers of 100 queries, at most 20 objects on an image. Terms and gradients are those of the reference in
float64, or no time is reported.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detr_kernels import Selection
from detr_profiling.observation import Observation, losses, on_host
from detr_profiling.reference.criterion import reference_criterion
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.clock import DEVICE, Size, time_case
from benchmarks.gate import verdict_of
from detr_fast.data.batch import Targets
from detr_fast.runtime import missing_for_compile
from detr_fast.training.criterion import build_criterion

ON_GPU = DEVICE.type == "cuda"
LAYERS, QUERIES, CLASSES, MOST_OBJECTS = 6, 100, 91, 20
Criterion = Callable[[dict[str, Any]], dict[str, Tensor]]
"""A model's outputs -> the terms of the loss, `loss` among them."""


@dataclass(frozen=True)
class LossCase:
    """Ours as `auto`, `triton` or `auto-compiled`; `reference`, `hf`."""

    name: str
    images: int
    precision: str = "fp32"
    size: str = f"{QUERIES}x{MOST_OBJECTS}"

    @property
    def group(self) -> str:
        return f"matching and loss, b{self.images}"


def cases(size: Size) -> Iterator[LossCase]:
    images = 16 if ON_GPU or size == "full" else 2
    compiled = (ON_GPU or size == "full") and missing_for_compile() is None
    names = ("reference", "hf", "auto", *(["triton"] if ON_GPU else []), *(["auto-compiled"] if compiled else []))
    for name in names:
        yield LossCase(name, images)


def make_targets(images: int) -> list[dict[str, Tensor]]:
    counts = torch.randint(1, MOST_OBJECTS + 1, (images,)).tolist()
    return [
        {"labels": torch.randint(CLASSES, (count,)).to(DEVICE), "boxes": (torch.rand(count, 4) * 0.5 + 0.2).to(DEVICE)}
        for count in counts
    ]


def make_criterion(name: str, targets: Sequence[dict[str, Tensor]]) -> Criterion:
    """Build the criterion `name`; targets lie on the device beforehand, laid out as it takes them."""
    if name == "reference":
        return lambda outputs: reference_criterion(outputs, targets)
    if name == "hf":
        return hugging_face_criterion(targets)
    criterion = build_criterion(CLASSES)
    if name == "triton":
        criterion.use(Selection.named(match_cost="triton", assignment="triton", set_loss="triton"))
    padded = Targets.from_list(targets)
    called: Any = torch.compile(criterion) if name.endswith("compiled") else criterion
    return lambda outputs: called(outputs, padded)


def hugging_face_criterion(targets: Sequence[dict[str, Tensor]]) -> Criterion:
    from transformers import DetrConfig
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    config = DetrConfig(use_pretrained_backbone=False, num_labels=CLASSES, auxiliary_loss=True, decoder_layers=LAYERS)
    labels = [{"class_labels": each["labels"], "boxes": each["boxes"]} for each in targets]

    def criterion(outputs: dict[str, Any]) -> dict[str, Tensor]:
        layers = [*outputs["aux_outputs"], outputs]
        logits, boxes = (torch.stack([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes"))
        loss, terms, _ = ForObjectDetectionLoss(logits[-1], labels, DEVICE, boxes[-1], config, logits, boxes)
        return {**terms, "loss": loss}

    return criterion


def observe(criterion: Criterion, logits: Tensor, boxes: Tensor) -> Observation:
    """Return every term, and the gradients of the logits (L, B, Q, C+1) and boxes (L, B, Q, 4)."""
    leaves = logits.detach().requires_grad_(), boxes.detach().requires_grad_()
    *early, last = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(*leaves, strict=True)]
    terms = criterion({**last, "aux_outputs": early})
    gradients = torch.autograd.grad(terms["loss"], leaves)
    return losses(terms) | dict(zip(("gradient logits", "gradient boxes"), gradients, strict=True))


def bench_loss(benchmark: BenchmarkFixture, case: LossCase) -> None:
    targets = make_targets(case.images)
    logits = torch.randn(LAYERS, case.images, QUERIES, CLASSES + 1, device=DEVICE)
    boxes = torch.rand(LAYERS, case.images, QUERIES, 4, device=DEVICE) * 0.5 + 0.2
    criterion, plain = make_criterion(case.name, targets), make_criterion("reference", targets)
    began = time.perf_counter()
    found = observe(criterion, logits, boxes)
    compile_s = time.perf_counter() - began if case.name.endswith("compiled") else None
    exact, eager = observe(plain, logits.double(), boxes.double()), observe(plain, logits, boxes)
    verdict = verdict_of(*map(on_host, (found, exact, eager)))
    time_case(benchmark, case, verdict, lambda: observe(criterion, logits, boxes), compile_s=compile_s)
