"""Noised targets, the queries of denoising sets (DN-DETR, Li et al. 2022, section 4; contrastive as in DINO, Zhang et
al. 2023, section 3.3), in shapes that do not depend on how many targets there are.

A set has Q queries. Of an image with n targets, query t < n is target t noised; queries n to 2n are the same targets
with more noise, and have to find that they are none; the rest are random boxes, and have to find the same.
"""

import torch
from torch import Tensor

from detr_fast.boxes import cxcywh_to_xyxy, iou
from detr_fast.config import ModelConfig
from detr_fast.data.batch import Targets
from detr_fast.model.query_sets import NoisedTargets

FLIPPED = 0.2
"""Probability that a label is drawn anew, of all classes."""
MOST_SHIFT, MOST_STRETCH = 0.5, 0.4
"""Most that a center is moved and a side changed, as a fraction of the side; of a negative at least that, at most twice
as much."""
MOST_OVERLAP = 0.3
"""Largest IoU of a random box with a target."""
DRAWS = 4
"""Random boxes of which one is taken that overlaps no target more than that; if all do, the one that does least."""
LARGEST_SIDE = 0.5
"""Largest side of a random box."""


@torch.no_grad()
def noised_targets(targets: Targets, sets: int, config: ModelConfig) -> NoisedTargets:
    """Draw the queries of `sets` sets on the targets' device, by its generator; without reading anything there."""
    targets = targets.pad_rows(targets.labels.shape[1] + 1)  # so that there is one where no image has a target
    labels, boxes, count = targets.labels, targets.boxes_cxcywh, targets.count[:, None]
    slot = torch.arange(config.num_queries, device=labels.device)
    negative, free = slot >= count, slot >= 2 * count  # (B, Q)
    target = torch.where(negative, slot - count, slot).clamp(max=labels.shape[1] - 1)
    shape = (len(labels), sets, config.num_queries)
    drawn = (torch.rand(shape, device=labels.device) < FLIPPED) | free[:, None]
    others = torch.randint(config.num_classes, shape, device=labels.device)
    wanted = boxes.gather(1, target[..., None].expand(-1, -1, 4))[:, None].expand(*shape, 4)
    return NoisedTargets(
        torch.where(drawn, others, labels.gather(1, target)[:, None]),
        torch.where(free[:, None, :, None], random_boxes(targets, shape), moved_boxes(wanted, negative[:, None])),
    )


def moved_boxes(boxes_cxcywh: Tensor, negative: Tensor) -> Tensor:
    """Noise boxes (B, G, Q, 4) in [0, 1], those that are to be negatives (B, 1, Q) more.

    A number that would leave [0, 1] is changed the other way.
    """
    noise = torch.rand_like(boxes_cxcywh) * 2 - 1
    noise = noise + negative[..., None] * torch.where(noise < 0, -1.0, 1.0)
    sides = boxes_cxcywh[..., 2:]
    change = noise * torch.cat((MOST_SHIFT * sides, MOST_STRETCH * sides), dim=-1)
    there = boxes_cxcywh + change
    return torch.where((there < 0) | (there > 1), boxes_cxcywh - change, there).clamp(0, 1)


def random_boxes(targets: Targets, shape: tuple[int, int, int]) -> Tensor:
    """Draw boxes (B, G, Q, 4), `shape` being (B, G, Q), that overlap no target much."""
    boxes = torch.rand(DRAWS, *shape, 4, device=targets.count.device)
    boxes = torch.cat((boxes[..., :2], LARGEST_SIDE * boxes[..., 2:]), dim=-1)
    corners, target_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes_cxcywh)
    overlap = iou(corners[..., None, :], target_corners[:, None, None])  # (DRAWS, B, G, Q, T)
    padding = torch.arange(overlap.shape[-1], device=boxes.device) >= targets.count[:, None]  # (B, T)
    overlap = overlap.masked_fill(padding[:, None, None], 0).amax(-1)
    best = overlap.clamp(min=MOST_OVERLAP).argmin(0)  # the first of equals
    return boxes.gather(0, best[None, ..., None].expand(1, *shape, 4))[0]


def own_queries(targets: Targets, num_queries: int) -> Tensor:
    """Return the query (B, T) int64 of each target in a denoising set, -1 for a target that has none."""
    row = torch.arange(targets.labels.shape[1], device=targets.count.device)
    return torch.where((row < targets.count[:, None]) & (row < num_queries), row, -1)
