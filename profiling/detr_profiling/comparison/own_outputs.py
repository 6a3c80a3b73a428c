"""Matches and losses that follow from a model's own outputs, recomputed by the plain reference in float64.

Whether logits and boxes are right is one question; whether the matches and the losses follow from them is another, and
its answer does not depend on how far the outputs themselves were rounded.
"""

import itertools
import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr_profiling.batches import observed_batch
from detr_profiling.observation import Observation
from detr_profiling.reference.criterion import Scores, image_cost, matched_losses, weighted_terms
from detr_profiling.workload import WorkloadOptions

TARGET_KEYS = ("target labels", "target boxes", "target counts")
"""(B, T) int64, (B, T, 4) cxcywh, (B,) int64."""
SIGMOID = "target scores are sigmoids"
"""Beside them, () bool: without it they are softmax."""
PROPOSALS = " of proposals"
"""Ends the names of what the encoder's tokens propose."""


def targets_of(options: WorkloadOptions) -> Observation:
    """Take the targets of a workload's observed batch."""
    targets = observed_batch(options, options.network.config().num_classes).targets
    found = dict(zip(TARGET_KEYS, (targets.labels, targets.boxes_cxcywh, targets.count), strict=True))
    return found | {SIGMOID: torch.tensor(options.network.config().scores == "sigmoid")}


def scores_of(targets: Observation) -> Scores:
    return "sigmoid" if targets.get(SIGMOID) else "softmax"


def plain_targets(targets: Observation) -> list[dict[str, Tensor]]:
    """List, for each image, labels (T,) and boxes (T, 4) float64."""
    labels, boxes, counts = (targets[key] for key in TARGET_KEYS)
    rows = zip(labels, boxes.double(), counts.tolist(), strict=True)
    return [{"labels": label[:count], "boxes": box[:count]} for label, box, count in rows]


def layer_outputs(found: Observation, of: str = "") -> list[dict[str, Any]]:
    """List each decoder layer's outputs in float64, first to last, as the reference returns them, or the PROPOSALS."""
    layers = zip(found[f"logits{of}"].double(), found[f"boxes{of}"].double(), strict=True)
    return [{"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in layers]


def losses_from_outputs(found: Observation, targets: Observation) -> Observation:
    """Compute every loss term of `found`'s outputs under `found`'s own matches, float64."""
    wanted, (*early, last) = plain_targets(targets), layer_outputs(found)
    layers = {f"_{index}": output for index, output in enumerate(early)} | {"": last}
    matches = dict(zip(layers, found["matches"], strict=True))
    if f"matches{PROPOSALS}" in found:
        layers |= {"_enc": layer_outputs(found, PROPOSALS)[0]}
        matches |= {"_enc": found[f"matches{PROPOSALS}"][0]}
    terms: Observation = {}
    for suffix, output in layers.items():
        pairs = [matched_pairs(row[: len(one["labels"])]) for row, one in zip(matches[suffix], wanted, strict=True)]
        terms |= {
            name + suffix: value for name, value in matched_losses(output, wanted, pairs, scores_of(targets)).items()
        }
    return weighted_terms(terms, scores_of(targets))


def matched_pairs(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the query of each target (T,), -1 for none, into queries and targets of the pairs."""
    (chosen,) = (queries >= 0).nonzero(as_tuple=True)
    return queries[chosen], chosen


def cost_of_matches(found: Observation, targets: Observation, of: str = "") -> tuple[Tensor, float]:
    """Compute by how much the matches cost more than the cheapest ones, (L, B) float64, NaN where they are no matches
    at all; and the largest sum of the costs' magnitudes in an image, which rounding is relative to."""
    matches, layers, wanted = found[f"matches{of}"], layer_outputs(found, of), plain_targets(targets)
    above, largest = torch.zeros(matches.shape[:2], dtype=torch.float64), 0.0
    for layer, image in itertools.product(*map(range, matches.shape[:2])):
        output, count, queries = layers[layer], len(wanted[image]["labels"]), matches[layer, image]
        if (queries[count:] >= 0).any():
            above[layer, image] = math.nan
        if count == 0:
            continue
        outputs = output["pred_logits"][image], output["pred_boxes"][image]
        cost = image_cost(*outputs, wanted[image], scores_of(targets))  # (Q, T)
        above[layer, image] += cost_above_least(cost, queries[:count])
        largest = max(largest, cost.abs().amax(0).sum().item())
    return above, largest


def cost_above_least(cost: Tensor, queries: Tensor) -> float:
    """Compute the excess cost of `queries` (T,), -1 for none, over the cheapest matching, by the cost (Q, T).

    NaN where two targets share a query or one lacks its own.
    """
    matched, chosen = matched_pairs(queries)
    if not cost.isfinite().all() or len(matched) != min(cost.shape) or len(matched.unique()) != len(matched):
        return math.nan
    return (cost[matched, chosen].sum() - cost[linear_sum_assignment(cost)].sum()).item()


def equal_matches(found: Observation, reference: Observation) -> float:
    """Compute the fraction of targets that have the same query in both; NaN without targets."""
    return (found["matches"] == reference["matches"])[reference["matches"] >= 0].double().mean().item()
