"""Bipartite matching of predictions and targets, all layers and images at once (Carion et al. 2020, section 3.1)."""

from dataclasses import dataclass

import torch
from detr_kernels import Selection, batched_assignment, match_cost
from torch import Tensor

from detr_fast.data.batch import Targets
from detr_fast.model.detr import Predictions


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the three terms of the matching cost."""

    class_: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    focal_alpha: float | None = None
    """Alpha of the focal losses whose difference is the class term of sigmoid scores; None: softmax."""


@torch.no_grad()
def match(
    predictions: Predictions, targets: Targets, weights: MatchCosts, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Match each layer by itself: query_of_target (L, B, T) int64, -1 for none, and the count of non-finite costs.

    Pairs whose cost is not finite are matched last and counted on the device; the caller decides when to stop.
    """
    layers = len(predictions.logits)
    wanted = (targets.labels, targets.boxes_cxcywh)
    backend, solver = (selection.backend(name, training=True) for name in ("match_cost", "assignment"))
    given = predictions.logits, predictions.boxes_cxcywh
    cost = match_cost(
        *given, *wanted, weights.class_, weights.l1, weights.giou, backend, focal_alpha=weights.focal_alpha
    )
    nonfinite = torch.zeros(1, dtype=torch.int64, device=cost.device)
    query_of_target = batched_assignment(cost.to(torch.float32), targets.count.repeat(layers), solver, nonfinite)
    return query_of_target.unflatten(0, (layers, -1)), nonfinite[0]
