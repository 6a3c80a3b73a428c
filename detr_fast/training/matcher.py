"""Bipartite matching of predictions and targets (DETR, Carion et al. 2020, section 3.1): all layers and images at
once."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_fast.boxes import cxcywh_to_xyxy, generalized_iou
from detr_fast.data.targets import Targets

NON_FINITE_COST = 1e6
"""Stands for a cost that is NaN or infinite: dearer than any real one, so such a pair is matched last."""


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the three terms of the matching cost."""

    class_: float = 1.0
    l1: float = 5.0
    giou: float = 2.0


@torch.no_grad()
def match_cost(logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, weights: MatchCosts) -> Tensor:
    """Cost (L, B, Q, T) float32 of each query for each target of its own image; logits (L, B, Q, C+1), boxes (L, B, Q,
    4)."""
    probability = logits.float().softmax(-1)
    labels = targets.labels[None, :, None, :].expand(*logits.shape[:3], -1)
    class_cost = -probability.gather(-1, labels)
    predicted, wanted = boxes_cxcywh.float()[..., None, :], targets.boxes_cxcywh[None, :, None]
    l1_cost = (predicted - wanted).abs().sum(-1)
    giou_cost = -generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return weights.class_ * class_cost + weights.l1 * l1_cost + weights.giou * giou_cost


@torch.no_grad()
def batched_assignment(cost: Tensor, num_targets: Tensor) -> Tensor:
    """The query of each target, (P, T) int64, at the least total cost; cost (P, Q, T) float32 finite, num_targets (P,).

    -1 where there is no target, or no query left for it: of more targets than queries the cheapest Q are matched.
    Solved by SciPy on the host: one copy there and one back for all problems together.
    """
    problems, queries, targets = cost.shape
    joined = torch.cat((cost.flatten(1), num_targets[:, None].to(cost.dtype)), dim=1).cpu().numpy()
    host_cost, counts = joined[:, :-1].reshape(problems, queries, targets), joined[:, -1].astype(int)
    query_of_target = np.full((problems, targets), -1, dtype=np.int64)
    for problem, count in enumerate(counts):
        rows, columns = linear_sum_assignment(host_cost[problem, :, :count])
        query_of_target[problem, columns] = rows
    return torch.from_numpy(query_of_target).to(cost.device, non_blocking=True)


@torch.no_grad()
def match(logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, weights: MatchCosts) -> tuple[Tensor, Tensor]:
    """Each layer matched anew: query_of_target (L, B, T) int64, -1 for none, and the count of non-finite costs, a
    scalar.

    Non-finite costs are replaced by a finite, dear one and counted on the device; the caller decides when to stop.
    """
    cost = match_cost(logits, boxes_cxcywh, targets, weights)
    broken = ~cost.isfinite() & targets.present[None, :, None]
    cost = torch.where(cost.isfinite(), cost, NON_FINITE_COST)
    layers = cost.shape[0]
    query_of_target = batched_assignment(cost.flatten(0, 1), targets.count.repeat(layers))
    return query_of_target.unflatten(0, (layers, -1)), broken.sum()
