"""Box geometry that the matcher, the loss and post-processing share."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) center and size to corners."""
    center, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners to center and size."""
    low, high = boxes_xyxy.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """GIoU of boxes (..., 4) with boxes (..., 4), broadcast; no eps, as in DETR: two empty boxes on one point give NaN.

    Rezatofighi et al. 2019, algorithm 1. Only the pairs asked for are computed.
    """
    a_low, a_high = a_xyxy.split(2, dim=-1)
    b_low, b_high = b_xyxy.split(2, dim=-1)
    intersection = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = (a_high - a_low).prod(-1) + (b_high - b_low).prod(-1) - intersection
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).clamp(min=0).prod(-1)
    return intersection / union - (hull - union) / hull
