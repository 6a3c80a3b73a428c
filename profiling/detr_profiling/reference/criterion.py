"""The plain reference's matching and losses, of softmax scores (Carion et al. 2020, section 3.1 and A.2) and of sigmoid
ones (Lin et al. 2017; Zhu et al. 2021): one image, one layer, one pair after another.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

Scores = Literal["softmax", "sigmoid"]
Matches = Sequence[tuple[Tensor, Tensor]]
"""Names, for each image, the matched queries and their targets."""

SigmoidLoss = Literal["focal", "varifocal"]
TERM_WEIGHTS: dict[Scores, dict[str, float]] = {
    "softmax": {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0},
    "sigmoid": {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0},
}
"""Also those of the matching costs."""
VARIFOCAL_WEIGHT = 1.0
NO_OBJECT_WEIGHT = 0.1
FOCAL_ALPHA = 0.25


def corners(boxes_cxcywh: Tensor) -> Tensor:
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)


def pairwise_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU (A, B) of boxes (A, 4) and (B, 4) (Rezatofighi et al. 2019)."""
    a, b = a_xyxy[:, None], b_xyxy[None]
    overlap = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union - (hull - union) / hull


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Compute the focal loss of each score, gamma 2; `wanted`: 1 where it should be 1, else 0."""
    score = logits.sigmoid()
    found = FOCAL_ALPHA * (1 - score) ** 2 * -F.logsigmoid(logits)
    avoided = (1 - FOCAL_ALPHA) * score**2 * -F.logsigmoid(-logits)
    return wanted * found + (1 - wanted) * avoided


def image_cost(logits: Tensor, boxes_cxcywh: Tensor, target: dict[str, Tensor], scores: Scores = "softmax") -> Tensor:
    """Compute the cost (Q, T) of each pair from one image's logits (Q, C+1), of sigmoid scores (Q, C), and boxes
    (Q, 4)."""
    if scores == "softmax":
        cost = -logits.softmax(-1)
    else:
        cost = focal_loss(logits, torch.ones_like(logits)) - focal_loss(logits, torch.zeros_like(logits))
    l1_cost = torch.cdist(boxes_cxcywh, target["boxes"].to(boxes_cxcywh.dtype), p=1)
    giou_cost = -pairwise_giou(corners(boxes_cxcywh), corners(target["boxes"]))
    weights = TERM_WEIGHTS[scores]
    return weights["loss_ce"] * cost[:, target["labels"]] + weights["loss_bbox"] * l1_cost + 2 * giou_cost


@torch.no_grad()
def match_image(
    logits: Tensor, boxes_cxcywh: Tensor, target: dict[str, Tensor], scores: Scores = "softmax"
) -> tuple[Tensor, Tensor]:
    """Match one image's logits (Q, .) and boxes (Q, 4): queries and targets, (min(Q, T),) each."""
    queries, targets = linear_sum_assignment(image_cost(logits, boxes_cxcywh, target, scores).cpu())
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)


def layer_losses(
    output: dict[str, Any],
    targets: Sequence[dict[str, Tensor]],
    scores: Scores = "softmax",
    class_loss: SigmoidLoss = "focal",
) -> dict[str, Tensor]:
    """Compute the three losses of one decoder layer, not yet weighted, each layer matched anew."""
    images = zip(output["pred_logits"], output["pred_boxes"], targets, strict=True)
    matches = [match_image(logits, boxes, target, scores) for logits, boxes, target in images]
    return matched_losses(output, targets, matches, scores, class_loss)


def matched_losses(
    output: dict[str, Any],
    targets: Sequence[dict[str, Tensor]],
    matches: Matches,
    scores: Scores = "softmax",
    class_loss: SigmoidLoss = "focal",
) -> dict[str, Tensor]:
    logits, boxes_cxcywh = output["pred_logits"], output["pred_boxes"]
    num_boxes = max(1, sum(len(target["labels"]) for target in targets))
    l1 = giou = boxes_cxcywh.new_zeros(())
    for image, (target, (queries, chosen)) in enumerate(zip(targets, matches, strict=True)):
        predicted, wanted = boxes_cxcywh[image, queries], target["boxes"][chosen].to(boxes_cxcywh.dtype)
        l1 = l1 + (predicted - wanted).abs().sum()
        giou = giou + (1 - pairwise_giou(corners(predicted), corners(wanted)).diagonal()).sum()
    if scores == "softmax":
        loss_ce = softmax_loss(logits, targets, matches, num_boxes)
    elif class_loss == "focal":
        loss_ce = sigmoid_loss(logits, targets, matches, num_boxes)
    else:
        loss_ce = varifocal_loss(logits, boxes_cxcywh.detach(), targets, matches) / num_boxes
    return {"loss_ce": loss_ce, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def softmax_loss(logits: Tensor, targets: Sequence[dict[str, Tensor]], matches: Matches, num_boxes: int) -> Tensor:
    """Compute the cross-entropy of all queries; what is not matched is "no object", the last class."""
    no_object = logits.shape[-1] - 1
    labels = torch.full(logits.shape[:2], no_object, device=logits.device)
    for image, (target, (queries, chosen)) in enumerate(zip(targets, matches, strict=True)):
        labels[image, queries] = target["labels"][chosen]
    class_weight = torch.ones(no_object + 1, dtype=logits.dtype, device=logits.device)
    class_weight[no_object] = NO_OBJECT_WEIGHT
    return F.cross_entropy(logits.transpose(1, 2), labels, class_weight)


def sigmoid_loss(logits: Tensor, targets: Sequence[dict[str, Tensor]], matches: Matches, num_boxes: int) -> Tensor:
    """Sum the focal loss of all queries and classes; what is not matched has none of them."""
    wanted = torch.zeros_like(logits)
    for image, (target, (queries, chosen)) in enumerate(zip(targets, matches, strict=True)):
        wanted[image, queries, target["labels"][chosen]] = 1
    return focal_loss(logits, wanted).sum() / num_boxes


def varifocal_loss(
    logits: Tensor, boxes_cxcywh: Tensor, targets: Sequence[dict[str, Tensor]], matches: Matches
) -> Tensor:
    """Sum the varifocal loss of all queries and classes (Zhang et al. 2021): where an object is matched, the cross
    entropy against the IoU of its box, weighted by it; elsewhere the focal loss."""
    total = focal_loss(logits, torch.zeros_like(logits)).sum()
    for image, (target, (queries, chosen)) in enumerate(zip(targets, matches, strict=True)):
        for query, number in zip(queries.tolist(), chosen.tolist(), strict=True):
            logit = logits[image, query, target["labels"][number]]
            predicted, wanted = corners(boxes_cxcywh[image, query]), corners(target["boxes"][number].to(logits.dtype))
            iou = box_iou(predicted[None], wanted[None])[0, 0]
            reached = iou * F.logsigmoid(logit) + (1 - iou) * F.logsigmoid(-logit)
            total = total - focal_loss(logit, torch.zeros_like(logit)) - iou * reached
    return total


def term_of(name: str) -> str:
    """Return a loss's name without the layer that it is of."""
    return name.removesuffix("_enc").rstrip("_0123456789")


def weighted_terms(
    terms: dict[str, Tensor], scores: Scores = "softmax", class_loss: SigmoidLoss = "focal"
) -> dict[str, Tensor]:
    """Weight `terms`, and add `loss`, their sum."""
    weights = dict(TERM_WEIGHTS[scores])
    if class_loss == "varifocal":
        weights["loss_ce"] = VARIFOCAL_WEIGHT
    loss = sum(value * weights[term_of(name)] for name, value in terms.items())
    return {**terms, "loss": torch.as_tensor(loss)}


def reference_criterion(
    outputs: dict[str, Any],
    targets: Sequence[dict[str, Tensor]],
    scores: Scores = "softmax",
    class_loss: SigmoidLoss = "focal",
) -> dict[str, Tensor]:
    """Compute every loss under DETR's names, `_0`, `_1`, ... for the earlier layers, `_enc` for the tokens' proposals,
    and `loss`, their weighted sum."""
    layers = {"": outputs} | {f"_{index}": output for index, output in enumerate(outputs["aux_outputs"])}
    if "enc_outputs" in outputs:
        layers["_enc"] = outputs["enc_outputs"]
    terms: dict[str, Tensor] = {}
    for suffix, output in layers.items():
        terms |= {name + suffix: value for name, value in layer_losses(output, targets, scores, class_loss).items()}
    return weighted_terms(terms, scores, class_loss)
