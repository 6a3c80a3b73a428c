"""DETR's matching cost in one launch: as exact as eager code, NaN where eager has it, and each image's own targets."""

import pytest
import torch
from detr_kernels import match_cost, match_cost_ref
from detr_kernels.loss.boxes import generalized_iou_ref
from detr_profiling.comparison.closeness import assert_same_function
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from tests.kernel_inputs import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")

# L, B, Q, C+1, T: DETR's queries and classes; one of each; one query and one target more than a block; more targets
# than queries, in three blocks, and classes that need a block of 256, so fewer queries; no targets
SHAPES = [(1, 1, 100, 92, 5), (1, 1, 1, 2, 1), (2, 3, 17, 7, 33), (1, 2, 9, 130, 70), (2, 1, 5, 7, 0)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 1e-6
"""Everything is float32 whatever the inputs' dtype: 8 units in the last place, for exponentials and quotients that are
rounded otherwise than torch's."""


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits and boxes in `dtype`, labels, target boxes; of each image's targets some rows are padding."""
    layers, images, queries, columns, targets = shape
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, images, queries, columns, generator=generator) * 3
    boxes = torch.rand(layers, images, queries, 4, generator=generator) * 0.8 + 0.1
    labels = torch.randint(0, columns - 1, (images, targets), generator=generator)
    target_boxes = torch.rand(images, targets, 4, generator=generator) * 0.8 + 0.1
    for image in range(images):
        first_padded = targets - image
        labels[image, first_padded:], target_boxes[image, first_padded:] = 0, 0.5
    return [each.to(DEVICE) for each in (logits.to(dtype), boxes.to(dtype), labels, target_boxes)]


def fused(*inputs: Tensor, **options: float) -> Tensor:
    return match_cost(*inputs, **options, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    assert_same_function(fused, match_cost_ref, inputs, TOLERANCE)
    assert fused(*inputs).shape == (shape[0] * shape[1], shape[2], shape[4])


def test_float32_boxes_with_half_precision_logits() -> None:
    logits, *rest = make_inputs((2, 2, 20, 7, 5))
    assert_same_function(fused, match_cost_ref, [logits.bfloat16(), *rest], TOLERANCE)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (2.0, 3.0, 0.5)])
def test_each_weight_weighs_its_term(weights: tuple[float, float, float]) -> None:
    options = dict(zip(("class_weight", "l1_weight", "giou_weight"), weights, strict=True))
    functions = [lambda *inputs, form=form: form(*inputs, **options) for form in (fused, match_cost_ref)]
    assert_same_function(*functions, make_inputs((2, 2, 20, 7, 5)), TOLERANCE)


@pytest.mark.parametrize("backend", ["triton", "ref"])
def test_layers_come_first_and_images_see_their_own_targets(backend: str) -> None:
    logits, boxes, labels, target_boxes = inputs = make_inputs((2, 3, 17, 7, 33))
    cost = match_cost(*inputs, backend=backend).unflatten(0, (2, 3))
    for layer in range(2):
        for image in range(3):
            predicted, wanted = boxes[layer, image], target_boxes[image]
            giou = generalized_box_iou(*(box_convert(each, "cxcywh", "xyxy") for each in (predicted, wanted)))
            probability = logits[layer, image].softmax(-1)[:, labels[image]]
            expected = -probability + 5 * torch.cdist(predicted, wanted, p=1) - 2 * giou
            torch.testing.assert_close(cost[layer, image], expected, atol=1e-5, rtol=0)


def test_nan_where_eager_has_it() -> None:
    logits, boxes, labels, target_boxes = make_inputs((1, 2, 20, 7, 6))
    nan, inf = float("nan"), float("inf")
    logits[0, 0, 1, 2], logits[0, 0, 2, 3], logits[0, 0, 3, 1], logits[0, 0, 4] = nan, inf, -inf, -inf
    point = torch.tensor([0.5, 0.25, 0.0, 0.0])
    target_boxes[0, 2] = boxes[0, 0, 5] = point  # no union, no hull
    boxes[0, 0, 6] = torch.tensor([0.5, 0.25, 1e-9, 1e-9])  # empty too, between its rounded corners
    boxes[0, 0, 7] = torch.tensor([0.75, 0.25, 0.25, 0.0])  # no union with the point, and no hull: one line
    boxes[0, 0, 8] = torch.tensor([0.75, 0.75, 0.0, 0.0])  # no union, but a hull: 0 / 0 all the same
    boxes[0, 0, 9, 0], boxes[0, 0, 10, 1], boxes[0, 0, 11, 2] = nan, inf, inf
    cost, expected = (match_cost(logits, boxes, labels, target_boxes, backend=form) for form in ("triton", "ref"))
    assert torch.equal(cost.isnan(), expected.isnan())
    assert expected[0, [1, 2, 4, 9, 10, 11]].isnan().all() and expected[0, 5:9, 2].isnan().all()
    assert expected.isnan().sum() == 6 * 6 + 4 and not expected[1].isnan().any()
    torch.testing.assert_close(cost, expected, atol=1e-5, rtol=1e-6, equal_nan=True)


def test_labels_out_of_range_read_nothing_elsewhere() -> None:
    logits, boxes, labels, target_boxes = make_inputs((1, 2, 20, 7, 6))
    labels[0, 1], labels[1, 2] = 2**40, -(2**40)
    cost = fused(logits, boxes, labels, target_boxes)
    torch.testing.assert_close(cost, match_cost_ref(logits, boxes, labels.clamp(0, 6), target_boxes), atol=1e-5, rtol=0)


def test_no_gradient() -> None:
    logits, boxes, *rest = make_inputs((1, 1, 5, 7, 2))
    assert not fused(logits.requires_grad_(), boxes.requires_grad_(), *rest).requires_grad
    assert not match_cost(logits, boxes, *rest, backend="ref").requires_grad


@pytest.mark.parametrize("shape", [(1, 0, 5, 7, 2), (0, 2, 5, 7, 2), (1, 2, 0, 7, 2)])
def test_nothing_to_match(shape: tuple[int, ...]) -> None:
    assert fused(*make_inputs(shape)).shape == (shape[0] * shape[1], shape[2], shape[4])


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, boxes, labels, target_boxes = make_inputs((1, 2, 5, 7, 3))
    for inputs in ((logits[0], boxes, labels, target_boxes), (logits, boxes, labels[:1], target_boxes[:1])):
        with pytest.raises(ValueError, match=r"\(1, 2, 5, 4\)"):
            match_cost(*inputs)
    with pytest.raises(ValueError, match=r"\(2, 2, 4\)"):
        match_cost(logits, boxes, labels, target_boxes[:, 1:])


def test_giou_is_torchvisions() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(count, 4, generator=generator) + 0.01 for count in (40, 30))
    corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b))
    torch.testing.assert_close(
        generalized_iou_ref(a[:, None], b[None]), generalized_box_iou(*corners), atol=1e-6, rtol=0
    )
