"""The set loss in plain torch, which the kernels are held against, and its terms; `set_loss` has the formulas."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.loss.boxes import at_least_float32, iou_and_giou_ref

ClassLoss = Literal["softmax", "focal", "varifocal"]
FOCAL_ALPHA = 0.25
"""Weight of an object in the focal loss, and, less 1, of what is none in both (Lin et al. 2017)."""


class SetLossTerms(NamedTuple):
    """Terms of the loss, each (L,) float32; the errors are for logging and have no gradient."""

    ce: Tensor
    bbox: Tensor
    giou: Tensor
    class_error: Tensor
    """Percent of matched queries whose likeliest class is not their target's."""
    cardinality_error: Tensor
    """How far the count of queries that see an object is from the count of targets: mean over images."""


def set_loss_ref(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    labels: Tensor,
    target_boxes_cxcywh: Tensor,
    num_targets: Tensor,
    query_of_target: Tensor,
    num_boxes: Tensor,
    class_weight_sum: Tensor,
    no_object_weight: float = 0.1,
    class_loss: ClassLoss = "softmax",
) -> SetLossTerms:
    """Compute `set_loss` in plain torch."""
    logits, boxes_cxcywh = at_least_float32(logits), at_least_float32(boxes_cxcywh)
    num_queries, no_object = logits.shape[2], logits.shape[3] - (class_loss == "softmax")
    boxes = num_boxes.clamp(min=1)
    matched, query = query_of_target >= 0, query_of_target.clamp(min=0)  # (L, B, T)
    predicted = boxes_cxcywh.gather(2, query[..., None].expand(-1, -1, -1, 4))  # (L, B, T, 4)
    # an unmatched row compares a target with itself: its loss and gradient are masked
    predicted = torch.where(matched[..., None], predicted, target_boxes_cxcywh.to(predicted.dtype))
    l1 = (predicted - target_boxes_cxcywh).abs().sum(-1)
    iou, giou = iou_and_giou_ref(predicted, target_boxes_cxcywh)

    # unmatched targets write into one column more, which is then cut off
    column = torch.where(matched, query, num_queries)
    wanted = torch.full((*logits.shape[:2], num_queries + 1), no_object, device=logits.device)
    wanted = wanted.scatter_(2, column, labels.expand_as(query))[..., :num_queries]  # (L, B, Q)
    if class_loss == "softmax":
        log_probability = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        ce = -(torch.where(wanted == no_object, no_object_weight, 1.0) * log_probability).sum((1, 2)) / class_weight_sum
    else:
        hit = wanted[..., None] == torch.arange(no_object, device=logits.device)
        entries = _focal(logits, hit)
        if class_loss == "varifocal":
            quality = iou.new_zeros(*logits.shape[:2], num_queries + 1)
            quality = quality.scatter_(2, column, iou.detach())[..., :num_queries, None]
            entries = torch.where(hit, quality * (F.softplus(logits) - quality * logits), entries)
        ce = entries.sum((1, 2, 3)) / boxes

    with torch.no_grad():
        chosen = logits.argmax(-1)  # (L, B, Q)
        right = ((chosen.gather(2, query) == labels) & matched).sum((1, 2))
        detected = chosen != no_object if class_loss == "softmax" else logits.amax(-1) > 0
        detected = detected.sum(2)  # (L, B)
        cardinality_error = (detected - num_targets).abs().to(logits.dtype).mean(1)
        class_error = class_error_of(right.to(logits.dtype), matched.sum((1, 2)))
    return SetLossTerms(
        ce,
        torch.where(matched, l1, 0).sum((1, 2)) / boxes,
        torch.where(matched, 1 - giou, 0).sum((1, 2)) / boxes,
        class_error,
        cardinality_error,
    )


def _focal(logits: Tensor, hit: Tensor) -> Tensor:
    """Compute the focal loss of each entry, gamma 2; `hit`: the class of the query's target."""
    wrong = torch.where(hit, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(hit, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return weight * wrong.square() * F.softplus(torch.where(hit, -logits, logits))


def class_error_of(right: Tensor, matched: Tensor) -> Tensor:
    """Compute percent (L,) from how many of the matched pairs are classified rightly; 100 without any, as in DETR."""
    return 100 - 100 * right / matched.clamp(min=1)
