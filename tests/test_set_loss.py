"""DETR's set loss, one kernel a direction: as exact as eager code, with torch's subgradients, and the paper's loss."""

from typing import Any, get_args

import pytest
import torch
from detr_kernels import SetLossTerms, match_cost, set_loss, set_loss_ref
from detr_kernels.loss.set_loss import ClassLoss
from detr_profiling.comparison.closeness import assert_same_function
from detr_profiling.reference.criterion import reference_criterion
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.kernel_inputs import DEVICE, TOLERANCES

pytestmark = pytest.mark.usefixtures("poisoned")

# L, Q, C+1, targets of each image, padded to the most: DETR's queries and classes, in several blocks; one of each;
# more queries and more targets than a block; an image without targets; more targets than queries; no target in any
# image, without padding; classes that need a block of 256
CASES = [
    (1, 100, 92, [7]),
    (1, 1, 2, [1]),
    (2, 70, 7, [40, 33]),
    (2, 7, 7, [0, 3]),
    (2, 7, 7, [4, 9]),
    (2, 7, 7, [0, 0]),
    (1, 20, 130, [3, 1]),
]


def make_inputs(
    layers: int, queries: int, columns: int, counts: list[int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """What `set_loss` takes, with logits and boxes in `dtype` and a random assignment."""
    images, targets = len(counts), max(counts)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, images, queries, columns, generator=generator) * 2
    boxes = torch.rand(layers, images, queries, 4, generator=generator) * 0.8 + 0.1
    labels = torch.zeros(images, targets, dtype=torch.int64)
    target_boxes = torch.full((images, targets, 4), 0.5)
    query_of_target = torch.full((layers, images, targets), -1)
    for image, count in enumerate(counts):
        labels[image, :count] = torch.randint(0, columns - 1, (count,), generator=generator)
        target_boxes[image, :count] = torch.rand(count, 4, generator=generator) * 0.8 + 0.1
        for layer in range(layers):
            pairs = min(count, queries)
            matched = torch.randperm(count, generator=generator)[:pairs]
            query_of_target[layer, image, matched] = torch.randperm(queries, generator=generator)[:pairs]
    given = [logits.to(dtype), boxes.to(dtype), labels, target_boxes, torch.tensor(counts), query_of_target]
    return [each.to(DEVICE) for each in (*given, *normalizers(counts, queries))]


def normalizers(counts: list[int], queries: int) -> tuple[Tensor, Tensor]:
    """The batch's box count, and the sum of its queries' class weights."""
    matched = sum(min(count, queries) for count in counts)
    return torch.tensor(float(sum(counts))), torch.tensor(matched + 0.1 * (len(counts) * queries - matched))


def fused(*inputs: Tensor, **options: Any) -> SetLossTerms:
    return set_loss(*inputs, **options, backend="triton")


def assert_same_terms_and_gradients(inputs: list[Tensor], tolerance: float, class_loss: ClassLoss = "softmax") -> None:
    """Of logits and boxes alone: the targets and what sums are divided by get no gradient.

    In float32 `tolerance` is 16 units in the last place: exponentials and quotients are rounded otherwise than torch's.
    """
    logits, boxes, *rest = inputs
    functions = [
        lambda *leaves, form=form: form(*leaves, *rest, class_loss=class_loss) for form in (fused, set_loss_ref)
    ]
    judged = assert_same_function(*functions, [logits, boxes], tolerance, factor=0.1)
    assert len(judged) == 7
    # the terms themselves are float32 whatever the inputs are: of at most 10, focal ones of more, percents of 100
    largest = set_loss_ref(*inputs, class_loss=class_loss).ce.abs().max().item()
    assert max(each.error for each in judged[:5]) < 2e-6 * max(10.0, largest)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("class_loss", get_args(ClassLoss))
def test_as_exact_as_eager(class_loss: ClassLoss, case: tuple[int, int, int, list[int]], dtype: torch.dtype) -> None:
    assert_same_terms_and_gradients(make_inputs(*case, dtype), TOLERANCES[dtype], class_loss)


def test_float32_boxes_with_half_precision_logits() -> None:
    logits, *rest = make_inputs(2, 20, 7, [3, 1])
    assert_same_terms_and_gradients([logits.bfloat16(), *rest], TOLERANCES[torch.bfloat16])


# cx, cy, w, h in eighths, so that equal edges are equal in every precision; the target is 3/8..5/8 in both axes
TIES = {
    "identical": [4, 4, 2, 2],
    "the same center, larger": [4, 4, 4, 4],
    "the same center, smaller": [4, 4, 1, 1],
    "inside, at its left edge": [3.5, 4, 1, 1],
    "around, with its right and lower edge": [3, 3, 4, 4],
    "touching on the left": [2, 4, 2, 2],
    "touching on the left, higher": [2, 4, 2, 4],
    "touching at a corner": [6, 6, 2, 2],
    "apart along x": [1, 4, 1, 2],
    "apart along both axes": [7, 1, 1, 1],
    "equal in height, shifted": [5, 4, 2, 2],
    "without width, on its edge": [3, 4, 0, 2],
    "a point inside": [4, 4, 0, 0],
    "a point at its corner": [5, 5, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16: Triton's interpreter cuts, not rounds
def test_torchs_subgradients_at_ties(dtype: torch.dtype) -> None:
    """Each box by itself as a layer, so that no larger gradient hides its error."""
    boxes = torch.tensor(list(TIES.values()), device=DEVICE)[:, None, None] / 8
    logits, _, *rest = make_inputs(len(TIES), 1, 2, [1], dtype)
    rest[1] = torch.tensor([[[0.5, 0.5, 0.25, 0.25]]], device=DEVICE)
    grads = []
    for form, precision in ((fused, dtype), (set_loss_ref, torch.float64)):
        leaf = boxes.to(precision).requires_grad_()
        terms = form(logits, leaf, *rest)
        grads.append([torch.autograd.grad(each.sum(), leaf, retain_graph=True)[0] for each in terms[1:3]])
    for result, exact in zip(*grads, strict=True):
        assert exact.isfinite().all() and result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("backend", ["triton", "ref"])
@pytest.mark.parametrize("counts", [[0, 3], [4, 9]])
def test_the_papers_loss_with_scipys_assignment(counts: list[int], backend: str) -> None:
    """Against a criterion that goes image by image and layer by layer, of 7 queries: also fewer than targets."""
    logits, boxes, labels, target_boxes, num_targets, query_of_target, *scalars = make_inputs(2, 7, 6, counts)
    cost = match_cost(logits, boxes, labels, target_boxes, backend=backend).cpu().unflatten(0, (2, 2))
    query_of_target.fill_(-1)
    for layer in range(2):
        for image, count in enumerate(counts):
            queries, matched = linear_sum_assignment(cost[layer, image, :, :count])
            query_of_target[layer, image, matched] = torch.from_numpy(queries).to(DEVICE)
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    terms = set_loss(*leaves, labels, target_boxes, num_targets, query_of_target, *scalars, backend=backend)
    loss = terms.ce.sum() + 5 * terms.bbox.sum() + 2 * terms.giou.sum()

    outputs = [{"pred_logits": logits[layer], "pred_boxes": boxes[layer]} for layer in range(2)]
    targets = [{"labels": labels[b, :count], "boxes": target_boxes[b, :count]} for b, count in enumerate(counts)]
    expected = reference_criterion({**outputs[1], "aux_outputs": outputs[:1]}, targets)
    for name in ("ce", "bbox", "giou"):
        of_layers = torch.stack([expected[f"loss_{name}_0"], expected[f"loss_{name}"]])
        torch.testing.assert_close(getattr(terms, name), of_layers, atol=1e-6, rtol=1e-5)
    grads, expected_grads = (torch.autograd.grad(each, leaves) for each in (loss, expected["loss"]))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-7, rtol=1e-5)


def test_each_term_alone_has_its_own_gradient_and_layer() -> None:
    logits, boxes, *rest = make_inputs(3, 20, 7, [3, 1])
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    for index, touched in enumerate((0, 1, 1)):
        grads, expected = (
            torch.autograd.grad(form(*leaves, *rest)[index][1], leaves, materialize_grads=True)
            for form in (fused, set_loss_ref)
        )
        assert grads[1 - touched].count_nonzero() == 0 and grads[touched][[0, 2]].count_nonzero() == 0
        assert grads[touched][1].count_nonzero() > 0
        torch.testing.assert_close(grads[touched], expected[touched], atol=1e-7, rtol=1e-5)


def test_errors_for_the_log_have_no_gradient_and_are_exact() -> None:
    """Ties among logits, which half precision has often: the first of the largest counts, as with argmax on a CPU."""
    logits, boxes, *rest = make_inputs(2, 70, 7, [40, 33])
    logits = logits.round().requires_grad_()
    assert ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any()
    terms = fused(logits, boxes.requires_grad_(), *rest)
    assert not terms.class_error.requires_grad and not terms.cardinality_error.requires_grad
    expected = set_loss_ref(logits.detach().cpu(), boxes.detach().cpu(), *(each.cpu() for each in rest))
    assert torch.equal(terms.cardinality_error.cpu(), expected.cardinality_error)
    torch.testing.assert_close(terms.class_error.cpu(), expected.class_error, atol=1e-5, rtol=0)
    assert 0 < terms.class_error[0] < 100


@pytest.mark.parametrize("backend", ["triton", "ref"])
@pytest.mark.parametrize("class_loss", get_args(ClassLoss))
def test_what_is_not_matched_counts_for_nothing(class_loss: ClassLoss, backend: str) -> None:
    """Neither an unmatched target's box nor an unmatched query's, whatever its geometry: not even as 0 * NaN."""
    logits, boxes, labels, target_boxes, num_targets, query_of_target, *scalars = make_inputs(2, 7, 7, [3, 9])
    broken_targets, broken_boxes = target_boxes.clone(), boxes.clone()
    query_of_target[:, 0, 1] = -1
    assert (query_of_target[:, 0, [1, 3, 4]] == -1).all()
    for index, box in ((1, [0.5, 0.5, 0, 0]), (3, [float("nan")] * 4), (4, [float("inf")] * 4)):
        broken_targets[0, index] = torch.tensor(box)
    free = torch.ones(2, 2, 8, dtype=torch.bool, device=DEVICE)
    free.scatter_(2, torch.where(query_of_target < 0, 7, query_of_target), False)
    broken_boxes[free[..., :7]] = float("nan")
    results = []
    for predicted, wanted in ((boxes, target_boxes), (broken_boxes, broken_targets)):
        leaves = logits.clone().requires_grad_(), predicted.clone().requires_grad_()
        given = labels, wanted, num_targets, query_of_target, *scalars
        terms = set_loss(*leaves, *given, backend=backend, class_loss=class_loss)
        results.append([*terms, *torch.autograd.grad(torch.stack(terms[:3]).sum(), leaves)])
    for plain, broken in zip(*results, strict=True):
        torch.testing.assert_close(broken, plain, atol=1e-7, rtol=1e-6)
    assert results[0][-1][free[..., :7]].count_nonzero() == 0


def test_a_nan_reaches_the_loss_of_its_layer() -> None:
    logits, boxes, *rest = make_inputs(3, 20, 7, [3, 1])
    query = rest[3][1, 0, 0]
    logits[0, 1, 19, 2] = boxes[1, 0, query, 1] = float("nan")
    leaves = logits.requires_grad_(), boxes.requires_grad_()
    terms, expected = fused(*leaves, *rest), set_loss_ref(*leaves, *rest)
    for term, wanted, layer in (
        (terms.ce, expected.ce, 0),
        (terms.bbox, expected.bbox, 1),
        (terms.giou, expected.giou, 1),
    ):
        assert term.isnan().nonzero().tolist() == [[layer]]
        torch.testing.assert_close(term, wanted, atol=1e-6, rtol=1e-5, equal_nan=True)
    grads, expected_grads = (torch.autograd.grad(torch.stack(each[:3]).sum(), leaves) for each in (terms, expected))
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-7, rtol=1e-5, equal_nan=True)


def test_the_same_sums_each_time() -> None:
    inputs = make_inputs(2, 70, 7, [40, 33])
    assert all(torch.equal(*pair) for pair in zip(fused(*inputs), fused(*inputs), strict=True))


def test_other_weights_of_no_object() -> None:
    logits, boxes, *rest = make_inputs(2, 20, 7, [3, 1])
    for weight in (0.0, 1.0, 0.37):
        functions = [
            lambda *leaves, form=form, weight=weight: form(*leaves, *rest, no_object_weight=weight)
            for form in (lambda *inputs, **options: set_loss(*inputs, **options, backend="triton"), set_loss_ref)
        ]
        assert_same_function(*functions, [logits, boxes], TOLERANCES[torch.float32], factor=0.1)


def test_a_box_count_below_one_counts_as_one() -> None:
    """It is a mean over ranks, so it may be a half where there is a pair all the same."""
    inputs = make_inputs(2, 7, 7, [0, 1])
    inputs[6].fill_(0.5)
    assert_same_terms_and_gradients(inputs, TOLERANCES[torch.float32])


def test_shapes_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(2, 20, 7, [3, 1])
    for index in range(6):
        wrong = [each[:, :1] if at == index and each.ndim > 1 else each for at, each in enumerate(inputs)]
        wrong[4] = inputs[4][:1] if index == 4 else inputs[4]
        with pytest.raises(ValueError, match="logits must be"):
            set_loss(*wrong)
