"""Model and criterion compile together into one graph, whichever backends their operations have."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from detr_fast.data.batch import Targets
from detr_fast.model.backends import hand_out, select_backends
from detr_fast.model.detr import DETR
from detr_fast.options import Attention, Kernels
from detr_fast.training.criterion import SetCriterion, build_criterion
from tests.factories import NARROW
from tests.kernel_inputs import DEVICE

pytestmark = pytest.mark.usefixtures("one_narrow_block_a_stage")

# what packs its tokens does so otherwise where nothing is padded; plain attention only has no mask there
CASES: list[tuple[Kernels, Attention, bool]] = [
    ("auto", "auto", True),
    ("auto", "auto", False),
    ("ref", "auto", True),
    ("triton", "auto", True),
    ("triton", "auto", False),
    ("triton", "sdpa", True),
]


def make_model(kernels: Kernels, attention: Attention, dropout: float = 0.0) -> tuple[DETR, SetCriterion]:
    torch.manual_seed(0)
    model, criterion = DETR(replace(NARROW, dropout=dropout)).to(DEVICE).train(), build_criterion(NARROW.num_classes)
    select_backends(model, kernels, attention)
    hand_out(model.selection, criterion)
    return model, criterion


def make_batch(padded: bool) -> tuple[Tensor, Tensor | None, Targets]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 32, 64, generator=generator).to(DEVICE)
    mask = torch.zeros(2, 32, 64, dtype=torch.bool, device=DEVICE)
    mask[1, :, 30:] = True
    boxes = torch.rand(2, 3, 4, generator=generator) * 0.5 + 0.2
    labels = torch.randint(0, NARROW.num_classes, (2, 3), generator=generator)
    return images, mask if padded else None, Targets(labels, boxes, torch.tensor([3, 0])).to(DEVICE)


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_no_graph_break_in_training_as_it_is_done(kernels: Kernels) -> None:
    """With dropout's seeds, autocast's mixture of dtypes, and activations computed again."""
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


@pytest.mark.parametrize(("kernels", "attention", "padded"), CASES)
def test_no_graph_break(kernels: Kernels, attention: Attention, padded: bool) -> None:
    """`fullgraph` raises at one. AOTAutograd traces the backward pass too, and runs what it traced."""
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
