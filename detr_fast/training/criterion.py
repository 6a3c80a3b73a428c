"""DETR's set loss (Carion et al. 2020, section 3.1 and A.2): class, L1 and GIoU of every decoder layer at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from detr_kernels import set_loss
from detr_kernels.loss.set_loss import FOCAL_ALPHA, ClassLoss
from torch import Tensor

from detr_fast.data.batch import Targets
from detr_fast.model.backends import Selectable
from detr_fast.model.detr import Predictions
from detr_fast.options import SigmoidLoss
from detr_fast.profiler_ranges import profiler_range
from detr_fast.training.denoising import own_queries
from detr_fast.training.matcher import MatchCosts, match


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the three losses, of those of denoising sets, and of "no object" among the classes."""

    ce: float = 1.0
    bbox: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1
    denoising: float = 1.0
    class_loss: ClassLoss = "softmax"
    """softmax, where "no object" is a class; of sigmoid scores focal, or varifocal, which asks for the boxes' IoU."""


@dataclass(frozen=True)
class Normalizers:
    """Divisors of the losses' sums: device scalars that follow from the targets alone.

    For several micro-batches or ranks they are made of all their targets together, so that the sum of their losses
    is the loss of the joined batch.
    """

    boxes: Tensor
    class_weight: Tensor

    def __add__(self, other: "Normalizers") -> "Normalizers":
        return Normalizers(self.boxes + other.boxes, self.class_weight + other.class_weight)


class SetCriterion(Selectable):
    """DETR's criterion: every term under its official name, and `loss`, their weighted sum. See `forward`."""

    def __init__(self, num_classes: int, weights: LossWeights, costs: MatchCosts) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights = weights
        self.costs = costs

    def normalizers(self, targets: Targets, num_queries: int) -> Normalizers:
        """Count one batch's boxes, and sum the class weights of its queries, matched or not."""
        matched = targets.count.clamp(max=num_queries).sum().float()
        unmatched = targets.count.numel() * num_queries - matched
        return Normalizers(targets.count.sum().float(), matched + unmatched * self.weights.no_object)

    def forward(
        self,
        predictions: Predictions | Mapping[str, Any],
        targets: Targets | Sequence[dict[str, Tensor]],
        normalizers: Normalizers | None = None,
    ) -> dict[str, Tensor]:
        """Compute all terms of the predictions, given as the network's `Predictions` or as its output mapping.

        Where there are proposals, they are matched and judged like a layer, and their terms end in `_enc`. Of several
        sets of queries, terms are the first one's; `loss` is the mean over the groups, and the mean over the denoising
        sets, `loss_denoising`, by its weight.

        `normalizers`: those of the whole optimizer step; default: of this batch. Terms: `loss_ce`, `loss_bbox`,
        `loss_giou`, `cardinality_error` of the last layer and, with `_0`, `_1`, ..., of the earlier ones; `class_error`
        of the last; `loss`; `nonfinite_costs`, the count of pairs whose cost had to be replaced.
        """
        if not isinstance(predictions, Predictions):
            predictions = Predictions.from_dict(predictions)
        if not isinstance(targets, Targets):
            targets = Targets.from_list(targets)
        normalizers = normalizers or self.normalizers(targets, predictions.logits.shape[2])
        result = self.layers(predictions, targets, normalizers)
        if predictions.proposals is not None:
            proposed = self.layers(predictions.proposals, targets, normalizers)
            for name in ("loss", "nonfinite_costs"):
                result[name] = result[name] + proposed.pop(name)
            result |= {f"{name}_enc": value for name, value in proposed.items()}
        return result

    def layers(self, predictions: Predictions, targets: Targets, normalizers: Normalizers) -> dict[str, Tensor]:
        """Compute the terms of stacked predictions: logits (S * L, B, Q, .), boxes (S * L, B, Q, 4)."""
        logits, boxes_cxcywh = predictions.logits, predictions.boxes_cxcywh
        with torch.autocast(logits.device.type, enabled=False):
            with profiler_range("matching"):
                query_of_target, nonfinite_costs = self.match(predictions, targets)
            losses = set_loss(
                logits,
                boxes_cxcywh,
                targets.labels,
                targets.boxes_cxcywh,
                targets.count,
                query_of_target,
                normalizers.boxes,
                normalizers.class_weight,
                self.weights.no_object,
                self.selection.backend("set_loss", training=True),
                class_loss=self.weights.class_loss,
            )
        terms = {
            "loss_ce": losses.ce,
            "loss_bbox": losses.bbox,
            "loss_giou": losses.giou,
            "class_error": losses.class_error,
            "cardinality_error": losses.cardinality_error,
        }
        result = self.total(terms, predictions.groups, predictions.denoising)
        for name, of_layers in terms.items():
            *early, last = of_layers.view(predictions.groups + predictions.denoising, -1)[0].unbind()
            result[name] = last
            if name != "class_error":
                result |= {f"{name}_{index}": value for index, value in enumerate(early)}
        return {**result, "nonfinite_costs": nonfinite_costs}

    def total(self, terms: dict[str, Tensor], groups: int, denoising: int) -> dict[str, Tensor]:
        """Join the terms (S * L,) of all layers: `loss` and, where there are denoising sets, `loss_denoising`."""
        sets = groups + denoising
        weights = {"loss_ce": self.weights.ce, "loss_bbox": self.weights.bbox, "loss_giou": self.weights.giou}
        weighted = (terms[name].view(sets, -1).sum(1) * weight for name, weight in weights.items())
        of_sets = sum(weighted, terms["loss_ce"].new_zeros(()))
        if sets == 1:
            return {"loss": of_sets.view(())}
        loss = of_sets[:groups].mean()
        if not denoising:
            return {"loss": loss}
        of_noise = of_sets[groups:].mean()
        return {"loss": loss + of_noise * self.weights.denoising, "loss_denoising": of_noise}

    def match(self, predictions: Predictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """Match the groups' layers as `match` does; in denoising sets each target's query is its own."""
        layers, images, queries = predictions.logits.shape[:3]
        denoising = layers // (predictions.groups + predictions.denoising) * predictions.denoising
        matched = layers - denoising
        groups = Predictions(predictions.logits[:matched], predictions.boxes_cxcywh[:matched])
        query_of_target, nonfinite = match(groups, targets, self.costs, self.selection)
        if denoising:
            own = own_queries(targets, queries).expand(denoising, images, -1)
            query_of_target = torch.cat((query_of_target, own))
        return query_of_target, nonfinite


def build_criterion(
    num_classes: int = 91,
    weights: LossWeights | None = None,
    costs: MatchCosts | None = None,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    class_loss: SigmoidLoss = "focal",
) -> SetCriterion:
    """Build DETR's criterion: the official costs 1/5/2, coefficients 1/5/2 and no-object weight 0.1 unless given.

    Of sigmoid scores the focal loss weighs 2, as its cost does, which both have (Zhu et al. 2021), and the varifocal
    loss 1 (Zhao et al. 2024, "RT-DETR").
    """
    weights, costs = weights or LossWeights(), costs or MatchCosts()
    if scores == "sigmoid":
        weights = replace(weights, ce=2.0 if class_loss == "focal" else 1.0, class_loss=class_loss)
        costs = replace(costs, class_=2.0, focal_alpha=FOCAL_ALPHA)
    return SetCriterion(num_classes, weights, costs)
