"""DETR's matching cost of every query for every target of its image, all layers and images in one launch.

    cost[q, t] = - class_weight * softmax(logits[q])[label[t]] + l1_weight * |box[q] - box[t]|_1
                 - giou_weight * GIoU(box[q], box[t])

With `focal_alpha` scores are sigmoids, and the first term is the focal loss that the query would have with this label,
less the one without (Zhu et al. 2021), times class_weight.

(Carion et al. 2020, section 3.1; probabilities, not their logarithms, so that the terms are of one size.) Eager code
writes a dozen intermediates of the cost's size; here the cost alone is written. Nothing is differentiated.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.launch import REFERENCE, TRITON, cdiv, launch, next_power_of_2
from detr_kernels.loss.boxes import (
    at_least_float32,
    generalized_iou,
    generalized_iou_ref,
    l1_distance,
    load_box,
)
from detr_kernels.loss.logits import softplus
from detr_kernels.registry import Facts, Operation, zero_flop
from detr_kernels.specimens import predictions_and_targets
from detr_kernels.triton_compat import UNALIGNED, tl, triton

TILE = 2048
"""Logits that a program holds: 16 a thread with 4 warps. Of 100 queries and 92 classes that is 7 programs a problem,
672 for 16 images and 6 layers."""
QUERIES = 16
"""At most, of few classes."""
TARGETS = 32
"""Targets at a time: 4 costs a thread. On an H100 a multiprocessor then holds 7 programs of float32 logits, so that all
run at once; with 64 targets, 108 registers a thread instead of 69, it would hold 4."""


@torch.no_grad()
def match_cost_ref(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    labels: Tensor,
    target_boxes_cxcywh: Tensor,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    focal_alpha: float | None = None,
) -> Tensor:
    """Compute `match_cost` in plain torch."""
    logits = at_least_float32(logits)
    if focal_alpha is None:
        goodness = logits.softmax(-1)  # (L, B, Q, C+1)
    else:
        score = logits.sigmoid()
        missing = focal_alpha * (1 - score).square() * F.softplus(-logits)
        goodness = (1 - focal_alpha) * score.square() * F.softplus(logits) - missing
    of_label = goodness.gather(-1, labels[None, :, None, :].expand(*logits.shape[:3], -1))  # (L, B, Q, T)
    predicted, wanted = at_least_float32(boxes_cxcywh)[..., None, :], target_boxes_cxcywh[None, :, None]
    l1 = (predicted - wanted).abs().sum(-1)
    cost = l1_weight * l1 - class_weight * of_label - giou_weight * generalized_iou_ref(predicted, wanted)
    return cost.flatten(0, 1)


@triton.jit(do_not_specialize=["queries", "targets"], do_not_specialize_on_alignment=UNALIGNED)
def _kernel(
    logits,  # (L, B, Q, COLUMNS)
    boxes,  # (L, B, Q, 4)
    labels,  # (B, T) int64
    target_boxes,  # (B, T, 4)
    cost,  # (L, B, Q, T) float32
    queries,
    targets,
    class_weight,
    l1_weight,
    giou_weight,
    focal_alpha,
    FOCAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    CLASSES: tl.constexpr,
    TARGETS: tl.constexpr,
):
    image = tl.program_id(1)
    problem = tl.program_id(2) * tl.num_programs(1) + image
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]
    column = tl.arange(0, CLASSES)[None, :]
    # rows past the last query repeat it: nothing of them is stored
    row = problem.to(tl.int64) * queries + tl.minimum(query, queries - 1)
    if not FOCAL:
        logit = tl.load(logits + row * COLUMNS + column, mask=column < COLUMNS, other=float("-inf")).to(tl.float32)
        highest = tl.max(logit, 1)[:, None]
        total = tl.sum(tl.exp(logit - highest), 1)[:, None]
    predicted = load_box(boxes, row, query < queries)
    for first in range(0, targets, TARGETS):
        target = first + tl.arange(0, TARGETS)[None, :]
        inside = target < targets
        index = image.to(tl.int64) * targets + target
        label = tl.load(labels + index, mask=inside, other=0)
        label = tl.minimum(tl.maximum(label, 0), COLUMNS - 1)  # never reads elsewhere, whatever the labels
        chosen = tl.load(logits + row * COLUMNS + label).to(tl.float32)
        wanted = load_box(target_boxes, index, inside)
        if FOCAL:
            score = tl.sigmoid(chosen)
            missing = focal_alpha * (1.0 - score) * (1.0 - score) * softplus(-chosen)
            goodness = (1.0 - focal_alpha) * score * score * softplus(chosen) - missing
        else:
            goodness = tl.exp(chosen - highest) / total
        value = l1_weight * l1_distance(predicted, wanted) - class_weight * goodness
        value -= giou_weight * generalized_iou(predicted, wanted)
        tl.store(cost + row * targets + target, value, mask=(query < queries) & inside)


def _forward(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    target_boxes: Tensor,
    class_weight: float,
    l1_weight: float,
    giou_weight: float,
    focal_alpha: float | None,
) -> Tensor:
    """Compute cost (L*B, Q, T) float32 of logits (L, B, Q, C+1), boxes (L, B, Q, 4), labels (B, T), boxes (B, T, 4)."""
    layers, images, queries, columns = logits.shape
    targets = labels.shape[1]
    cost = torch.empty(layers * images, queries, targets, dtype=torch.float32, device=logits.device)
    tensors = (each.contiguous() for each in (logits, boxes, labels, target_boxes))
    classes = next_power_of_2(columns)
    blocks = {"QUERIES": max(1, min(QUERIES, TILE // classes)), "CLASSES": classes, "TARGETS": TARGETS}
    grid = (cdiv(queries, blocks["QUERIES"]), images, layers)
    arguments = (*tensors, cost, queries, targets, class_weight, l1_weight, giou_weight, focal_alpha or 0.0)
    focal = focal_alpha is not None
    # the class count is compiled in: 92 is no multiple of 16, and only as a constant is a row known to allow wide loads
    launch(_kernel, grid, *arguments, FOCAL=focal, COLUMNS=columns, **blocks, num_warps=4)
    return cost


forward_op = torch.library.custom_op("detr_kernels::match_cost", _forward, mutates_args=())


@forward_op.register_fake
def _(logits, boxes, labels, *_):
    layers, images, queries, _ = logits.shape
    return logits.new_empty((layers * images, queries, labels.shape[1]), dtype=torch.float32)


def _specimens() -> None:
    for logits, boxes, labels, target_boxes in predictions_and_targets():
        for focal_alpha in (None, 0.25):
            _forward(logits, boxes, labels, target_boxes, 1.0, 5.0, 2.0, focal_alpha)


OPERATION = Operation(
    "match_cost", (TRITON, REFERENCE), mode="training", flop={"match_cost": zero_flop}, specimens=_specimens
)


@torch.no_grad()
def match_cost(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    labels: Tensor,
    target_boxes_cxcywh: Tensor,
    class_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    backend: str = "auto",
    focal_alpha: float | None = None,
) -> Tensor:
    """Compute the cost (L*B, Q, T) float32 of each query for each target of its own image, without a gradient.

    Layers are outermost. logits (L, B, Q, C+1) and boxes_cxcywh (L, B, Q, 4) of any floating dtype, taken as float32;
    labels (B, T) int64 in [0, C]; target_boxes_cxcywh (B, T, 4) float32. `focal_alpha`: logits are (L, B, Q, C), and
    scores sigmoids. Rows of padding get a cost like any other. NaN where a query's logits or box are NaN, and where two
    boxes have no hull to divide by. Raises ValueError for shapes that do not fit and RuntimeError where Triton is asked
    for and cannot run.
    """
    fit = logits.ndim == 4 and boxes_cxcywh.shape == (*logits.shape[:3], 4)
    fit = fit and labels.ndim == 2 and labels.shape[0] == logits.shape[1]
    if not fit or target_boxes_cxcywh.shape != (*labels.shape, 4):
        shapes = [tuple(each.shape) for each in (logits, boxes_cxcywh, labels, target_boxes_cxcywh)]
        raise ValueError(
            f"logits must be (L, B, Q, C+1), boxes (L, B, Q, 4), labels (B, T), target boxes (B, T, 4); got {shapes}"
        )
    arguments = (logits, boxes_cxcywh, labels, target_boxes_cxcywh, class_weight, l1_weight, giou_weight, focal_alpha)
    if OPERATION.choose(Facts(logits.device), backend).backend == "ref":
        return match_cost_ref(*arguments)
    return forward_op(*arguments)
