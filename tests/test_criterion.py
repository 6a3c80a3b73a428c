"""The criterion's hard cases: no targets, more targets than queries, non-finite outputs, micro-batches of one batch."""

from typing import Any

import pytest
import torch
from detr_kernels import Selection
from detr_profiling.reference.criterion import reference_criterion
from torch import Tensor

from detr_fast import build_criterion
from detr_fast.data.batch import Targets
from detr_fast.model.detr import Predictions
from detr_fast.training.criterion import Normalizers, SetCriterion
from detr_fast.training.matcher import MatchCosts, match

NUM_CLASSES = 5


def make_outputs(batch: int, num_queries: int, layers: int = 3, seed: int = 0) -> dict[str, Any]:
    """Random outputs that are leaves, so that they get gradients."""
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for _ in range(layers):
        logits = torch.randn(batch, num_queries, NUM_CLASSES + 1, generator=generator)
        boxes = torch.rand(batch, num_queries, 4, generator=generator) * 0.5 + 0.2
        outputs.append({"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()})
    return {**outputs[-1], "aux_outputs": outputs[:-1]}


def make_targets(counts: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [
        {
            "labels": torch.randint(0, NUM_CLASSES, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.2,
        }
        for count in counts
    ]


def leaves(outputs: dict[str, Any]) -> list[Tensor]:
    layers = [*outputs["aux_outputs"], outputs]
    return [layer[name] for layer in layers for name in ("pred_logits", "pred_boxes")]


@pytest.fixture
def criterion() -> SetCriterion:
    return build_criterion(NUM_CLASSES)


# a batch without any target, one image without, more targets than queries in one image and in all
@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [4, 9], [9, 12], [1]])
def test_same_terms_and_gradients_as_the_reference(criterion: SetCriterion, counts: list[int]) -> None:
    outputs, targets = make_outputs(len(counts), num_queries=7), make_targets(counts)
    terms, expected = criterion(outputs, targets), reference_criterion(outputs, targets)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, atol=1e-6, rtol=1e-5)
    grads, expected_grads = (torch.autograd.grad(each["loss"], leaves(outputs)) for each in (terms, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-7, rtol=1e-5)
    assert terms["loss"].isfinite() and terms["nonfinite_costs"] == 0


def test_empty_batch_still_teaches_no_object(criterion: SetCriterion) -> None:
    outputs = make_outputs(2, 7)
    terms = criterion(outputs, make_targets([0, 0]))
    terms["loss"].backward()
    assert terms["loss_bbox"] == 0 and terms["loss_giou"] == 0 and terms["loss_ce"] > 0
    assert outputs["pred_logits"].grad.abs().sum() > 0 and outputs["pred_boxes"].grad.abs().sum() == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_non_finite_outputs_are_matched_last_and_counted(name: str, broken: float) -> None:
    outputs, targets = make_outputs(2, 7), Targets.from_list(make_targets([3, 2]))
    with torch.no_grad():
        outputs[name][1, 4] = broken
    predictions = Predictions(outputs["pred_logits"][None], outputs["pred_boxes"][None])
    query_of_target, nonfinite = match(predictions, targets, MatchCosts(), Selection())
    assert nonfinite == 2  # one query, two targets; the cost of the padding, a third, is no one's
    assert 4 not in query_of_target[0, 1].tolist()
    assert (query_of_target[0, 0, :3] >= 0).all() and (query_of_target[0, 1, :2] >= 0).all()


def test_all_costs_non_finite(criterion: SetCriterion) -> None:
    outputs = make_outputs(1, 3)
    with torch.no_grad():
        outputs["pred_boxes"].fill_(float("nan"))
    terms = criterion(outputs, make_targets([2]))
    assert terms["nonfinite_costs"] == 6
    assert not terms["loss"].isfinite()  # counted and matched without a crash; the step is then skipped


def test_micro_batches_with_joined_normalizers_are_the_joined_batch(criterion: SetCriterion) -> None:
    """Micro-batches of different box counts, one with more targets than queries."""
    counts = [3, 0, 9, 1]
    outputs, targets = make_outputs(4, 7), make_targets(counts)
    whole = criterion(outputs, targets)
    whole_grads = torch.autograd.grad(whole["loss"], leaves(outputs))

    some = [slice(0, 2), slice(2, 3), slice(3, 4)]
    normalizers: list[Normalizers] = [criterion.normalizers(Targets.from_list(targets[part]), 7) for part in some]
    joined = sum(normalizers[1:], normalizers[0])
    losses = [criterion(images(outputs, part), targets[part], joined) for part in some]
    grads = torch.autograd.grad(sum(terms["loss"] for terms in losses), leaves(outputs))
    for name in ("loss", "loss_ce", "loss_bbox_0", "loss_giou_1"):
        torch.testing.assert_close(sum(terms[name] for terms in losses), whole[name], atol=0, rtol=1e-5)
    for grad, whole_grad in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, whole_grad, atol=1e-7, rtol=1e-5)


def test_the_mapping_and_the_stacked_predictions_give_the_same(criterion: SetCriterion) -> None:
    outputs, targets = make_outputs(2, 7), make_targets([3, 2])
    predictions = Predictions.from_dict(outputs)
    assert predictions.logits.shape == (3, 2, 7, NUM_CLASSES + 1) and predictions.boxes_cxcywh.shape == (3, 2, 7, 4)
    again = predictions.to_dict()
    for one, other in zip(leaves(outputs), leaves(again), strict=True):
        assert torch.equal(one, other)
    terms, expected = criterion(predictions, targets), criterion(outputs, targets)
    assert terms.keys() == expected.keys() and all(torch.equal(terms[name], expected[name]) for name in expected)


def images(outputs: dict[str, Any], part: slice) -> dict[str, Any]:
    """The outputs of some of the images."""
    layers = [{key: layer[key][part] for key in ("pred_logits", "pred_boxes")} for layer in outputs["aux_outputs"]]
    return {**{key: outputs[key][part] for key in ("pred_logits", "pred_boxes")}, "aux_outputs": layers}
