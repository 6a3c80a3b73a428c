"""Our model and criterion against the plain reference, where golden/ has no numbers: other sizes, counts, precisions.

The plain reference is held against facebookresearch's own outputs in test_golden.py.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from detr_profiling.comparison.closeness import largest_error
from detr_profiling.reference.criterion import reference_criterion
from detr_profiling.reference.detr import ReferenceDETR
from detr_profiling.reference.name_seeded_weights import (
    name_seeded_state_dict,
    perturbed_state_dict,
    seeded_batch,
    seeded_targets,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from detr_fast import DETR, build_criterion, build_model, export_state_dict, load_state_dict
from detr_fast.model.backends import select_backends
from detr_fast.training.optimizer import build_optimizer

LAYERS = {"encoder_layers": 2, "decoder_layers": 3}
BATCHES = {
    "ragged": ([(96, 128), (80, 64)], [3, 5]),
    "no targets in one image, odd sizes": ([(33, 130), (65, 64), (64, 47)], [4, 0, 2]),
    "more targets than queries": ([(64, 96)], [11]),
    "no targets at all": ([(64, 64), (32, 64)], [0, 0]),
}
NUM_QUERIES = 8
GRADIENT_TOLERANCE = 1e-7
"""Of the total norm. Gradients that are zero in exact arithmetic (the decoder starts from zeros) are rounding noise."""

Step = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


@dataclass
class Pair:
    """Our model and the reference with the same weights, and a batch."""

    ours: DETR
    reference: ReferenceDETR
    batch: tuple[Tensor, Tensor]
    targets: list[dict[str, Tensor]]

    def double(self) -> "Pair":
        images, mask = self.batch
        double = copy.deepcopy(self.ours).double(), copy.deepcopy(self.reference).double()
        return Pair(*double, (images.double(), mask), self.targets)

    def step_ours(self, kernels: str) -> Step:
        select_backends(self.ours, kernels, dtype=self.batch[0].dtype)
        return step(self.ours, build_criterion(), self)

    def step_reference(self) -> Step:
        return step(self.reference, reference_criterion, self)


def step(model: nn.Module, criterion: Callable[..., dict[str, Tensor]], pair: Pair) -> Step:
    """Outputs, terms, and gradients under our names; of the model they keep nothing."""
    model.zero_grad()
    outputs = model(*pair.batch)
    terms = criterion(outputs, pair.targets)
    terms["loss"].backward()
    named = {key.replace("backbone.0.body.", "backbone."): value.grad for key, value in model.named_parameters()}
    found = outputs, terms, {key: grad for key, grad in named.items() if grad is not None}
    model.zero_grad()
    return tree_map_only(Tensor, Tensor.detach, found)


def make_pair(fill: Callable[[dict[str, Tensor], int], dict[str, Tensor]], batch: str) -> Pair:
    torch.manual_seed(3)
    ours = build_model("detr_r50", num_queries=NUM_QUERIES, dropout=0.0, **LAYERS)
    state_dict = fill(export_state_dict(ours, "facebook"), 7)
    load_state_dict(ours, state_dict)
    reference = ReferenceDETR(num_queries=NUM_QUERIES, dropout=0.0, **LAYERS)
    reference.load_state_dict(state_dict)
    sizes, counts = BATCHES[batch]
    return Pair(ours.eval(), reference.eval(), seeded_batch(sizes, salt=1), seeded_targets(counts, salt=1))


@pytest.fixture(scope="module", params=BATCHES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(name_seeded_state_dict, request.param)


def assert_same_gradients(grads: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each parameter's gradient within `tolerance` of the expected one's norm."""
    assert grads.keys() == expected.keys()
    floor = GRADIENT_TOLERANCE * sum(grad.norm() ** 2 for grad in expected.values()) ** 0.5
    for name, grad in grads.items():
        error = (grad - expected[name]).norm()
        assert error <= tolerance * expected[name].norm() + floor, name


def assert_same_step(ours: Step, expected: Step, tolerance: float) -> None:
    (outputs, terms, grads), (expected_outputs, expected_terms, expected_grads) = ours, expected
    for layer, reference in zip(all_layers(outputs), all_layers(expected_outputs), strict=True):
        for name in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(layer[name].double(), reference[name].double(), atol=1e-5, rtol=0)
    for name, value in expected_terms.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert_same_gradients(grads, expected_grads, tolerance)


def all_layers(outputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    return [*outputs["aux_outputs"], outputs]


def test_same_step_in_the_reference_order_of_operations(pair: Pair) -> None:
    assert_same_step(pair.step_ours("ref"), pair.step_reference(), tolerance=1e-4)


def test_fast_path_is_the_same_function(pair: Pair) -> None:
    """In float64, where rounding hides nothing but the heads' float32 outputs (6e-8)."""
    double = pair.double()
    assert_same_step(double.step_ours("auto"), double.step_reference(), tolerance=1e-6)


def one_rounding_each(module: nn.Module, seed: int) -> None:
    """Every convolution errs from now on, at random, by up to one rounding in float32 of its terms' magnitudes."""
    generator = torch.Generator().manual_seed(seed)

    def err(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen, weight = inputs[0].detach().abs(), conv.weight.detach().abs()
        terms = F.conv2d(seen, weight, None, conv.stride, conv.padding, conv.dilation)
        drawn = torch.rand(output.shape, generator=generator, dtype=output.dtype) * 2 - 1
        return output + 2**-24 * terms * drawn

    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.register_forward_hook(err)


def moved(pair: Pair, seed: int) -> Pair:
    double = pair.double()
    one_rounding_each(double.reference, seed)
    return double


@pytest.mark.parametrize("fill", [name_seeded_state_dict, perturbed_state_dict])
def test_fast_path_in_float32(fill: Callable[[dict[str, Tensor], int], dict[str, Tensor]]) -> None:
    """Keyed weights amplify roundings: the floors are what a single one in each convolution moves in float64."""
    pair = make_pair(fill, "ragged")
    exact = pair.double().step_reference()
    rounded = [errors(moved(pair, seed).step_reference(), exact) for seed in range(5)]
    floors = {name: max(each[name] for each in rounded) for name in rounded[0]}
    eager, fast = errors(pair.step_reference(), exact), errors(pair.step_ours("auto"), exact)
    for name, error in fast.items():
        assert error <= 2 * eager[name] + floors[name], name


def errors(step: Step, exact: Step) -> dict[str, float]:
    """The largest of logits and boxes, and that of all gradients together as a part of their norm."""
    found = {name: largest_error(step[0][name], exact[0][name]) for name in ("pred_logits", "pred_boxes")}
    in_float64 = joined(exact[2])
    return found | {"gradients": ((joined(step[2]) - in_float64).norm() / in_float64.norm()).item()}


def joined(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].flatten().double() for name in sorted(grads)])


def test_twenty_training_steps() -> None:
    """The same loss curve. AdamW makes full steps of gradients that are rounding noise, so the curves may part by a
    percent; the first steps agree closely."""
    pair = make_pair(perturbed_state_dict, "ragged")
    ours = curve(pair.ours, build_criterion(), pair)
    reference = curve(pair.reference, reference_criterion, pair)
    assert ours[:2] == pytest.approx(reference[:2], rel=1e-6)
    assert ours == pytest.approx(reference, rel=1e-2)
    assert reference[-1] < 0.8 * reference[0]


def curve(model: nn.Module, criterion: Callable[..., dict[str, Tensor]], pair: Pair) -> list[float]:
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = criterion(model(*pair.batch), pair.targets)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_with_dropout_the_reference_order_of_operations_draws_the_same_numbers() -> None:
    """One image, in training: outputs equal bit for bit, and torch's generator left at the same place. Gradients are
    those of a loss that adds its terms in another order. (Of several images torch draws for the tokens in memory order,
    which is (B, N, D) here and (N, B, D) in DETR: other entries are dropped.)"""
    torch.manual_seed(3)
    ours = build_model("detr_r50", num_queries=NUM_QUERIES, dropout=0.1, **LAYERS)
    weights = perturbed_state_dict(export_state_dict(ours, "facebook"), 7)
    load_state_dict(ours, weights)
    reference = ReferenceDETR(num_queries=NUM_QUERIES, dropout=0.1, **LAYERS)
    reference.load_state_dict(weights)
    pair = Pair(ours.train(), reference.train(), seeded_batch([(96, 128)], salt=1), seeded_targets([3], salt=1))
    steps, numbers = [], []
    for run in (lambda: pair.step_ours("ref"), pair.step_reference):
        torch.manual_seed(11)
        steps.append(run())
        numbers.append(torch.randint(2**40, (1,)).item())
    (outputs, _, grads), (expected, _, expected_grads) = steps
    for layer, other in zip(all_layers(outputs), all_layers(expected), strict=True):
        assert torch.equal(layer["pred_logits"], other["pred_logits"])
        assert torch.equal(layer["pred_boxes"], other["pred_boxes"])
    assert numbers[0] == numbers[1]
    assert_same_gradients(grads, expected_grads, tolerance=1e-5)
