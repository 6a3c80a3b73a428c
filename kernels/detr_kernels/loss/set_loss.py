"""DETR's set loss of every decoder layer at once: class, L1 and GIoU, forward and backward.

    ce   = sum over queries of w[label] * -log softmax(logits)[label] / class_weight_sum,    w = no_object_weight or 1
    bbox = sum over matched pairs of |box - target|_1 / max(num_boxes, 1)
    giou = sum over matched pairs of (1 - GIoU(box, target)) / max(num_boxes, 1)

In the focal losses each class has a score of its own, the sigmoid p of its logit, none is "no object", and

    ce   = sum over queries and classes of a * (1 - q)^2 * -log q / max(num_boxes, 1)

where q, a are p, alpha for the class of a query's target, and 1 - p, 1 - alpha for any other (Lin et al. 2017). In the
varifocal loss the class of a query's target has the IoU u of its box with the target's as the score to reach (Zhang et
al. 2021, "VarifocalNet"), and

    u * (u * -log p + (1 - u) * -log(1 - p))

in the place of its term; u has no gradient.

(Carion et al. 2020, section 3.1 and A.2.) A query looks its target up by comparing the targets' queries with its own
number: nothing is scattered, so sums come in one order and sizes follow from shapes alone. The backward pass finds the
softmax again and writes each gradient once.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from detr_kernels.launch import REFERENCE, TRITON, cdiv, launch, next_power_of_2
from detr_kernels.loss.boxes import generalized_iou, generalized_iou_gradient, iou_and_giou, l1_distance, load_box
from detr_kernels.loss.logits import focal_parts, load_logits, log_softmax, softplus
from detr_kernels.loss.set_loss_ref import FOCAL_ALPHA, ClassLoss, SetLossTerms, class_error_of, set_loss_ref
from detr_kernels.registry import Facts, Operation, zero_flop
from detr_kernels.specimens import IMAGES, LAYERS, meta, predictions_and_targets
from detr_kernels.triton_compat import UNALIGNED, tl, triton

FORWARD_TILE = 8192
"""Logits that a program holds at a time: 32 a thread with 8 warps. One program a problem, so that the sums over its
queries are whole: 2 rounds for 100 queries, 96 programs for 16 images and 6 layers."""
BACKWARD_TILE = 4096
"""32 a thread with 4 warps. Queries need nothing of each other here: 4 programs a problem, 384 in all."""
QUERIES = 64
"""At most, of few classes."""
TARGETS = 32
"""Targets compared at a time. Every thread comes to hold all of them; 64 would cost the backward pass 40 registers."""


@triton.jit
def _assigned(query_of_target, query, problem, image, targets, TARGETS: tl.constexpr):
    """Find which queries have a target, and its row in (B, T); as `query` (QUERIES, 1) in shape."""
    found = tl.full(query.shape, -1, tl.int32)
    for first in range(0, targets, TARGETS):
        target = first + tl.arange(0, TARGETS)[None, :]
        of = tl.load(query_of_target + problem * targets + target, mask=target < targets, other=-1)
        found = tl.maximum(found, tl.max(tl.where(of == query, target, -1), 1)[:, None])
    return found >= 0, image.to(tl.int64) * targets + found


@triton.jit(do_not_specialize=["queries", "targets"], do_not_specialize_on_alignment=UNALIGNED)
def _forward_kernel(
    logits,  # (L, B, Q, COLUMNS)
    boxes,  # (L, B, Q, 4)
    labels,  # (B, T) int64
    target_boxes,  # (B, T, 4)
    num_targets,  # (B,) int64
    query_of_target,  # (L, B, T) int64
    num_boxes,  # ()
    class_weight_sum,  # ()
    terms,  # (6, L, B) float32, to be summed over the images
    queries,
    targets,
    class_weight,  # of "no object"; alpha of the focal loss
    LOSS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    CLASSES: tl.constexpr,
    TARGETS: tl.constexpr,
):
    image, problems = tl.program_id(0), tl.num_programs(0) * tl.num_programs(1)
    problem = (tl.program_id(1) * tl.num_programs(0) + image).to(tl.int64)
    ce, bbox, giou, right, matches, detected = (tl.zeros((QUERIES, 1), tl.float32),) * 6
    for first in range(0, queries, QUERIES):
        query = first + tl.arange(0, QUERIES)[:, None]
        inside = query < queries
        row = problem * queries + tl.minimum(query, queries - 1)  # past the last query, that one again
        matched, target = _assigned(query_of_target, query, problem, image, targets, TARGETS)
        logit = load_logits(logits, row, COLUMNS, CLASSES)
        column = tl.arange(0, CLASSES)[None, :]
        chosen = tl.argmax(logit, 1)[:, None]
        if LOSS != "softmax":
            label = tl.load(labels + target, mask=matched, other=COLUMNS)
            seen = tl.max(logit, 1)[:, None] > 0
            logit = tl.where(column < COLUMNS, logit, 0.0)
            hit = column == label
            weight, wrong, entropy = focal_parts(logit, hit, class_weight)
            entry = weight * wrong * wrong * entropy
            if LOSS == "varifocal":
                quality, _ = iou_and_giou(load_box(boxes, row, inside), load_box(target_boxes, target, matched))
                entry = tl.where(hit, quality * (softplus(logit) - quality * logit), entry)
            entry = tl.where(column < COLUMNS, entry, 0.0)
            ce += tl.where(inside, tl.sum(entry, 1)[:, None], 0.0)
        else:
            label = tl.load(labels + target, mask=matched, other=COLUMNS - 1)
            seen = chosen != COLUMNS - 1
            of_label = tl.where(column == label, log_softmax(logit), 0.0)
            weight = tl.where(label == COLUMNS - 1, class_weight, 1.0)
            ce -= tl.where(inside, weight * tl.sum(of_label, 1)[:, None], 0.0)
        detected += tl.where(inside & seen, 1.0, 0.0)
        right += tl.where(matched & (chosen == label), 1.0, 0.0)
        matches += tl.where(matched, 1.0, 0.0)
        predicted, wanted = load_box(boxes, row, inside), load_box(target_boxes, target, matched)
        bbox += tl.where(matched, l1_distance(predicted, wanted), 0.0)
        giou += tl.where(matched, 1 - generalized_iou(predicted, wanted), 0.0)
    count = tl.load(num_targets + image).to(tl.float32)
    boxes_norm = tl.maximum(tl.load(num_boxes).to(tl.float32), 1.0)
    class_norm = boxes_norm if LOSS != "softmax" else tl.load(class_weight_sum).to(tl.float32)
    terms += problem
    tl.store(terms, tl.sum(ce) / class_norm)
    tl.store(terms + problems, tl.sum(bbox) / boxes_norm)
    tl.store(terms + 2 * problems, tl.sum(giou) / boxes_norm)
    tl.store(terms + 3 * problems, tl.sum(right))
    tl.store(terms + 4 * problems, tl.sum(matches))
    tl.store(terms + 5 * problems, tl.abs(tl.sum(detected) - count) / tl.num_programs(0))


@triton.jit(do_not_specialize=["queries", "targets"], do_not_specialize_on_alignment=UNALIGNED)
def _backward_kernel(
    d_terms,  # (6, L) float32
    logits,  # (L, B, Q, COLUMNS)
    boxes,  # (L, B, Q, 4)
    labels,  # (B, T) int64
    target_boxes,  # (B, T, 4)
    query_of_target,  # (L, B, T) int64
    num_boxes,  # ()
    class_weight_sum,  # ()
    d_logits,  # (L, B, Q, COLUMNS)
    d_boxes,  # (L, B, Q, 4)
    queries,
    targets,
    class_weight,  # of "no object"; alpha of the focal loss
    LOSS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    CLASSES: tl.constexpr,
    TARGETS: tl.constexpr,
):
    image, layer, layers = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    problem = (layer * tl.num_programs(1) + image).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]
    inside = query < queries
    row = problem * queries + tl.minimum(query, queries - 1)  # past the last query, that one again
    matched, target = _assigned(query_of_target, query, problem, image, targets, TARGETS)

    boxes_norm = tl.maximum(tl.load(num_boxes).to(tl.float32), 1.0)
    logit = load_logits(logits, row, COLUMNS, CLASSES)
    column = tl.arange(0, CLASSES)[None, :]
    if LOSS != "softmax":
        hit = column == tl.load(labels + target, mask=matched, other=COLUMNS)
        weight, wrong, entropy = focal_parts(tl.where(column < COLUMNS, logit, 0.0), hit, class_weight)
        d_logit = weight * wrong * wrong * (2.0 * (1.0 - wrong) * entropy + wrong)
        if LOSS == "varifocal":
            quality, _ = iou_and_giou(load_box(boxes, row, inside), load_box(target_boxes, target, matched))
            d_logit = tl.where(hit, quality * (1.0 - wrong - quality), d_logit)
        else:
            d_logit = tl.where(hit, -d_logit, d_logit)
        d_logit *= tl.load(d_terms + layer) / boxes_norm
    else:
        label = tl.load(labels + target, mask=matched, other=COLUMNS - 1)
        d_ce = tl.load(d_terms + layer) / tl.load(class_weight_sum).to(tl.float32)
        scale = tl.where(label == COLUMNS - 1, class_weight, 1.0) * d_ce
        d_logit = scale * (tl.exp(log_softmax(logit)) - tl.where(column == label, 1.0, 0.0))
    at = row * COLUMNS + column
    tl.store(d_logits + at, d_logit.to(d_logits.dtype.element_ty), mask=inside & (column < COLUMNS))

    d_bbox = tl.load(d_terms + layers + layer) / boxes_norm
    d_giou = tl.load(d_terms + 2 * layers + layer) / boxes_norm
    predicted, wanted = load_box(boxes, row, inside), load_box(target_boxes, target, matched)
    giou_gradient = generalized_iou_gradient(predicted, wanted)
    for side in tl.static_range(4):
        difference = predicted[side] - wanted[side]
        d_side = tl.where(difference > 0, d_bbox, tl.where(difference < 0, -d_bbox, 0.0))
        d_side = tl.where(matched, d_side - d_giou * giou_gradient[side], 0.0)
        tl.store(d_boxes + row * 4 + side, d_side.to(d_boxes.dtype.element_ty), mask=inside)


def _blocks(columns: int, tile: int) -> dict[str, int]:
    """Choose what a program holds at a time: as many queries as the tile allows.

    The class count is compiled in: 92 is no multiple of 16, and only as a constant is it known to allow wide loads.
    """
    classes = next_power_of_2(columns)
    queries = max(1, min(QUERIES, tile // classes))
    return {"COLUMNS": columns, "QUERIES": queries, "CLASSES": classes, "TARGETS": TARGETS}


def _forward(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    num_targets: Tensor,
    query_of_target: Tensor,
    num_boxes: Tensor,
    class_weight_sum: Tensor,
    class_weight: float,
    class_loss: str,
) -> Tensor:
    """Compute (6, L) float32: ce, bbox, giou, which have gradients; right and matched pairs, cardinality error."""
    layers, images, queries, columns = logits.shape
    terms = torch.empty(6, layers, images, dtype=torch.float32, device=logits.device)
    given = (logits, boxes, labels, target_boxes, num_targets, query_of_target, num_boxes, class_weight_sum)
    arguments = (*(each.contiguous() for each in given), terms, queries, labels.shape[1], class_weight)
    blocks = _blocks(columns, FORWARD_TILE if class_loss == "softmax" else FORWARD_TILE // 2)  # focal losses hold more
    launch(_forward_kernel, (images, layers), *arguments, LOSS=class_loss, **blocks, num_warps=8)
    return terms.sum(2)


def _backward(
    d_terms: Tensor,
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    query_of_target: Tensor,
    num_boxes: Tensor,
    class_weight_sum: Tensor,
    class_weight: float,
    class_loss: str,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of logits and boxes in their dtypes, from the first three rows of d_terms (6, L)."""
    layers, images, queries, columns = logits.shape
    d_logits, d_boxes = logits.new_empty(logits.shape), boxes.new_empty(boxes.shape)
    given = (d_terms, logits, boxes, labels, target_boxes, query_of_target, num_boxes, class_weight_sum)
    tensors = (*(each.contiguous() for each in given), d_logits, d_boxes)
    blocks = _blocks(columns, BACKWARD_TILE)
    grid = (cdiv(queries, blocks["QUERIES"]), images, layers)
    sizes = queries, labels.shape[1], class_weight
    launch(_backward_kernel, grid, *tensors, *sizes, LOSS=class_loss, **blocks, num_warps=4)
    return d_logits, d_boxes


forward_op = torch.library.custom_op("detr_kernels::set_loss", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::set_loss_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(logits, *_):
    return logits.new_empty((6, logits.shape[0]), dtype=torch.float32)


@backward_op.register_fake
def _(d_terms, logits, boxes, *_):
    return logits.new_empty(logits.shape), boxes.new_empty(boxes.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, boxes, labels, target_boxes, _, *rest, class_weight, class_loss = inputs
    ctx.class_loss = class_weight, class_loss
    ctx.save_for_backward(logits, boxes, labels, target_boxes, *rest)


def _autograd(ctx: Any, d_terms: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(d_terms, *ctx.saved_tensors, *ctx.class_loss), *[None] * 8


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def _specimens() -> None:
    for logits, boxes, labels, target_boxes in predictions_and_targets():
        counts, query_of_target = (meta(*shape, dtype=torch.int64) for shape in ((IMAGES,), (LAYERS, *labels.shape)))
        scalar = meta(dtype=torch.float32)
        tensors = (logits, boxes, labels, target_boxes, counts, query_of_target, scalar, scalar)
        for class_loss in get_args(ClassLoss):
            d_terms = _forward(*tensors, 0.1, class_loss)
            _backward(d_terms, *tensors[:4], *tensors[5:], 0.1, class_loss)


OPERATION = Operation(
    "set_loss",
    (TRITON, REFERENCE),
    mode="training",
    flop=dict.fromkeys(("set_loss", "set_loss_backward"), zero_flop),
    specimens=_specimens,
)


def set_loss(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    labels: Tensor,
    target_boxes_cxcywh: Tensor,
    num_targets: Tensor,
    query_of_target: Tensor,
    num_boxes: Tensor,
    class_weight_sum: Tensor,
    no_object_weight: float = 0.1,
    backend: str = "auto",
    class_loss: ClassLoss = "softmax",
) -> SetLossTerms:
    """Compute the terms of every decoder layer, (L,) each.

    Gradients reach logits and boxes_cxcywh through `ce`, `bbox` and `giou`. logits (L, B, Q, C+1), the last class being
    "no object", and boxes_cxcywh (L, B, Q, 4) of any floating dtype, taken as float32; labels (B, T) int64;
    target_boxes_cxcywh (B, T, 4) float32; num_targets (B,) int64; query_of_target (L, B, T) int64: the query matched to
    each target, -1 for none, no query twice in an image; num_boxes and class_weight_sum: scalars on the device, what
    the sums are divided by. With a focal `class_loss` logits are (L, B, Q, C), scores are sigmoids, and `ce` is divided
    by num_boxes; neither class_weight_sum nor no_object_weight is used. Unmatched targets count for nothing, NaN or
    not. Raises ValueError for shapes that do not fit and RuntimeError where Triton is asked for and cannot run.
    """
    given = (logits, boxes_cxcywh, labels, target_boxes_cxcywh, num_targets, query_of_target)
    arguments = (*given, num_boxes, class_weight_sum)
    layers, images, queries = logits.shape[:3] if logits.ndim == 4 else (-1, -1, -1)
    targets = labels.shape[-1]
    shapes = [tuple(each.shape) for each in given]
    per_image = [(images, targets), (images, targets, 4), (images,), (layers, images, targets)]
    if shapes[1:] != [(layers, images, queries, 4), *per_image]:
        raise ValueError(
            "logits must be (L, B, Q, C+1), boxes (L, B, Q, 4), labels (B, T), target boxes (B, T, 4), num_targets "
            f"(B,), query_of_target (L, B, T); got {shapes}"
        )
    if OPERATION.choose(Facts(logits.device), backend).backend == "ref":
        return set_loss_ref(*arguments, no_object_weight, class_loss)
    class_weight = no_object_weight if class_loss == "softmax" else FOCAL_ALPHA
    ce, bbox, giou, right, matched, cardinality_error = forward_op(*arguments, class_weight, class_loss).unbind()
    class_error = class_error_of(right.detach(), matched.detach())
    return SetLossTerms(ce, bbox, giou, class_error, cardinality_error.detach())
