"""Makes detections of the network's outputs: every query's best class, its score and its box in pixels."""

from torch import Tensor

from detr_fast.boxes import cxcywh_to_xyxy


def postprocess(logits: Tensor, boxes_cxcywh: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decode logits (B, Q, C + 1) and boxes (B, Q, 4), relative to images of `sizes_hw` (B, 2) in pixels, height first.

    Returns scores (B, Q), the largest softmax without the last class, which is "no object"; labels (B, Q) int64; boxes
    xyxy (B, Q, 4) in pixels. All queries are kept: no threshold, no suppression (Carion et al. 2020, section 4).
    """
    scores, labels = logits.softmax(-1)[..., :-1].max(-1)
    scale = sizes_hw.to(boxes_cxcywh).flip(-1).repeat(1, 2)  # (B, 4): width, height, width, height
    return scores, labels, cxcywh_to_xyxy(boxes_cxcywh) * scale[:, None]
