"""Makes detections of the network's outputs: classes, scores, and boxes in pixels."""

from typing import Literal

import torch
from torch import Tensor

from detr_fast.boxes import cxcywh_to_xyxy

USUAL_THRESHOLDS = {"softmax": 0.7, "sigmoid": 0.35}
"""Least score of a detection that is shown, by kind of scores, where nobody says. DETR's 0.7; the focal loss leaves
scores lower: on three data sets the F1 of `detr_lite` was largest at 0.34 to 0.41."""
MOST_DETECTIONS = 100
"""Detections of an image whose queries may have several classes: as many as COCO's numbers count."""


def postprocess(
    logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor, scores: Literal["softmax", "sigmoid"] = "softmax"
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode logits (B, Q, C + 1) and boxes (B, Q, 4), relative to images of `sizes_hw` (B, 2) in pixels, height first.

    Returns scores (B, Q), the largest softmax without the last class, which is "no object"; labels (B, Q) int64; boxes
    xyxy (B, Q, 4) in pixels. All queries are kept: no threshold, no suppression (Carion et al. 2020, section 4).

    Of sigmoid scores, logits (B, Q, C), each class of a query is a detection of its own: the best 100 of an image, or
    as many as there are, instead of Q (Zhu et al. 2021).
    """
    scale = sizes_hw.to(boxes_cxcywh).flip(-1).repeat(1, 2)  # (B, 4): width, height, width, height
    boxes = cxcywh_to_xyxy(boxes_cxcywh) * scale[:, None]
    if scores == "softmax":
        return *logits.softmax(-1)[..., :-1].max(-1), boxes
    flat = logits.sigmoid().flatten(1)
    best, index = flat.topk(min(MOST_DETECTIONS, flat.shape[1]))
    query = torch.div(index, logits.shape[-1], rounding_mode="floor")
    return best, index % logits.shape[-1], boxes.gather(1, query[..., None].expand(-1, -1, 4))
