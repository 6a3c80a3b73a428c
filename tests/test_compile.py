"""Model and criterion compile together into one graph, whichever forms their operations have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from detr_fast.config import MODELS
from detr_fast.data.batch import Targets
from detr_fast.model import backbone
from detr_fast.model.backends import hand_out, select_backends
from detr_fast.model.detr import DETR
from detr_fast.options import Attention, Kernels
from detr_fast.training.criterion import SetCriterion, build_criterion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=2, num_queries=7, num_classes=5, dropout=0.0)
FORMS: list[tuple[Kernels, Attention]] = [("auto", "auto"), ("ref", "auto"), ("triton", "auto"), ("triton", "sdpa")]
NAMES = ["-".join(forms) for forms in FORMS]


def make_model(kernels: Kernels, attention: Attention, dropout: float = 0.0) -> tuple[DETR, SetCriterion]:
    torch.manual_seed(0)
    model, criterion = DETR(replace(CONFIG, dropout=dropout)).to(DEVICE).train(), build_criterion(CONFIG.num_classes)
    select_backends(model, kernels, attention)
    hand_out(model.selection, criterion)
    return model, criterion


def make_batch(padded: bool) -> tuple[Tensor, Tensor | None, Targets]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 64, generator=generator).to(DEVICE)
    mask = torch.zeros(2, 32, 64, dtype=torch.bool, device=DEVICE)
    mask[1, :, 30:] = True
    boxes = torch.rand(2, 3, 4, generator=generator) * 0.5 + 0.2
    labels = torch.randint(0, CONFIG.num_classes, (2, 3), generator=generator)
    return images, mask if padded else None, Targets(labels, boxes, torch.tensor([3, 0])).to(DEVICE)


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_no_graph_break_in_training_as_it_is_done(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout's seeds, autocast's mixture of dtypes, and activations computed again."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    monkeypatch.setattr(backbone, "STAGE_WIDTHS", (8, 16, 16, 32))
    images, mask, targets = make_batch(True)
    model, criterion = make_model(kernels, "auto", dropout=0.1)
    model.transformer.checkpoint_activations = True

    def loss(images: Tensor, mask: Tensor | None, targets: Targets) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs = model(images, mask)
        return criterion(outputs, targets)["loss"]

    counters.clear()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(images, mask, targets).backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("padded", [True, False], ids=["ragged", "one size"])
@pytest.mark.parametrize(
    ("kernels", "attention"), FORMS, ids=[f"{kernels}-{attention}" for kernels, attention in FORMS]
)
def test_no_graph_break(kernels: Kernels, attention: Attention, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph` raises at one. AOTAutograd traces the backward pass too, and runs what it traced."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    monkeypatch.setattr(backbone, "STAGE_WIDTHS", (8, 16, 16, 32))
    images, mask, targets = make_batch(padded)
    (model, criterion), (eager_model, eager_criterion) = (make_model(kernels, attention) for _ in range(2))

    def loss(images: Tensor, mask: Tensor | None, targets: Targets) -> dict[str, Tensor]:
        return criterion(model(images, mask), targets)

    counters.clear()
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    terms, expected = compiled(images, mask, targets), eager_criterion(eager_model(images, mask), targets)
    terms["loss"].backward()
    expected["loss"].backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    found = gradients(model)
    total = sum(grad.norm() ** 2 for grad in found.values()) ** 0.5
    for name, grad in gradients(eager_model).items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * total, name
