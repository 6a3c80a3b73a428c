"""DETR's set loss (Carion et al. 2020, section 3.1 and A.2): class, L1 and GIoU of every decoder layer at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.boxes import cxcywh_to_xyxy, generalized_iou
from detr_fast.data.targets import Targets
from detr_fast.training.matcher import MatchCosts, match


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the three losses, and the weight of "no object" among the classes."""

    ce: float = 1.0
    bbox: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


@dataclass(frozen=True)
class Normalizers:
    """What the sums are divided by: device scalars that follow from the targets alone.

    For several microbatches or ranks they are made of all their targets together, so that the sum of the parts' losses
    is the loss of the joined batch.
    """

    boxes: Tensor
    class_weight: Tensor

    def __add__(self, other: "Normalizers") -> "Normalizers":
        return Normalizers(self.boxes + other.boxes, self.class_weight + other.class_weight)


class SetCriterion(nn.Module):
    """`criterion(outputs, targets)` -> every term under DETR's names, and `loss`, their weighted sum."""

    def __init__(self, num_classes: int, weights: LossWeights, costs: MatchCosts) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights = weights
        self.costs = costs
        class_weight = torch.ones(num_classes + 1)
        class_weight[-1] = weights.no_object
        self.register_buffer("class_weight", class_weight, persistent=False)

    class_weight: Tensor

    def normalizers(self, targets: Targets, num_queries: int) -> Normalizers:
        """Of one batch: its box count, and the class weights' sum, which follows from how many queries get a target."""
        matched = targets.count.clamp(max=num_queries).sum().float()
        unmatched = targets.count.numel() * num_queries - matched
        return Normalizers(targets.count.sum().float(), matched + unmatched * self.weights.no_object)

    def forward(
        self,
        outputs: dict[str, Any],
        targets: Targets | Sequence[dict[str, Tensor]],
        normalizers: Normalizers | None = None,
    ) -> dict[str, Tensor]:
        """The model's outputs and the batch's targets; `normalizers`: of the whole optimizer step, default: of this
        batch.

        Terms: `loss_ce`, `loss_bbox`, `loss_giou`, `cardinality_error` of the last layer and, with `_0`, `_1`, ..., of
        the
        earlier ones; `class_error` of the last; `loss`; `nonfinite_costs`, the count of pairs whose cost had to be
        replaced.
        """
        if not isinstance(targets, Targets):
            targets = Targets.from_list(targets)
        layers = [*outputs["aux_outputs"], outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()  # (L, B, Q, C+1)
        boxes_cxcywh = torch.stack([layer["pred_boxes"] for layer in layers]).float()  # (L, B, Q, 4)
        normalizers = normalizers or self.normalizers(targets, logits.shape[2])
        with torch.autocast(logits.device.type, enabled=False):
            query_of_target, nonfinite_costs = match(logits, boxes_cxcywh, targets, self.costs)
            terms = self._terms(logits, boxes_cxcywh, targets, query_of_target, normalizers)
        weights = {"loss_ce": self.weights.ce, "loss_bbox": self.weights.bbox, "loss_giou": self.weights.giou}
        result = {"loss": sum((terms[name].sum() * weight for name, weight in weights.items()), logits.new_zeros(()))}
        for name, of_layers in terms.items():
            *early, last = of_layers.unbind()
            result[name] = last
            if name != "class_error":
                result |= {f"{name}_{index}": value for index, value in enumerate(early)}
        return {**result, "nonfinite_costs": nonfinite_costs}

    def _terms(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, query_of_target: Tensor, normalizers: Normalizers
    ) -> dict[str, Tensor]:
        """Each term as (L,)."""
        matched = query_of_target >= 0  # (L, B, T)
        query = query_of_target.clamp(min=0)
        wanted_labels = targets.labels.expand_as(query)

        # unmatched targets write into one column more, which is then cut off
        num_queries = logits.shape[2]
        labels = torch.full((*logits.shape[:2], num_queries + 1), self.num_classes, device=logits.device)
        labels.scatter_(2, torch.where(matched, query, num_queries), wanted_labels)
        labels = labels[..., :num_queries]  # (L, B, Q)
        log_probability = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        class_loss = -(self.class_weight[labels] * log_probability).sum((1, 2)) / normalizers.class_weight

        predicted = boxes_cxcywh.gather(2, query[..., None].expand(-1, -1, -1, 4))  # (L, B, T, 4)
        wanted = targets.boxes_cxcywh.expand_as(predicted)
        # an unmatched row compares a target with itself: its loss and gradient are masked, and stay finite
        predicted = torch.where(matched[..., None], predicted, wanted)
        l1 = (predicted - wanted).abs().sum(-1)
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        num_boxes = normalizers.boxes.clamp(min=1)

        with torch.no_grad():
            chosen = logits.argmax(-1)  # (L, B, Q)
            right = (chosen.gather(2, query) == wanted_labels) & matched
            class_error = 100 - 100 * right.sum((1, 2)) / matched.sum((1, 2)).clamp(min=1)
            detected = (chosen != self.num_classes).sum(2)
            cardinality_error = (detected - targets.count).abs().float().mean(1)
        return {
            "loss_ce": class_loss,
            "loss_bbox": torch.where(matched, l1, 0).sum((1, 2)) / num_boxes,
            "loss_giou": torch.where(matched, 1 - giou, 0).sum((1, 2)) / num_boxes,
            "class_error": class_error,
            "cardinality_error": cardinality_error,
        }


def build_criterion(
    num_classes: int = 91, weights: LossWeights | None = None, costs: MatchCosts | None = None
) -> SetCriterion:
    """DETR's criterion with the official costs 1/5/2, coefficients 1/5/2 and no-object weight 0.1 unless given."""
    return SetCriterion(num_classes, weights or LossWeights(), costs or MatchCosts())
