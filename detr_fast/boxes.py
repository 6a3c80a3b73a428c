"""Box forms: center and size, and corners."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert boxes (..., 4) from center and size to corners."""
    center, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert boxes (..., 4) from corners to center and size."""
    low, high = boxes_xyxy.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def iou(one_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Compute the IoU (...) of boxes (..., 4) and (..., 4), broadcast; of boxes without area it is 0."""
    shared = _area(
        torch.maximum(one_xyxy[..., :2], other_xyxy[..., :2]), torch.minimum(one_xyxy[..., 2:], other_xyxy[..., 2:])
    )
    joined = _area(*one_xyxy.split(2, dim=-1)) + _area(*other_xyxy.split(2, dim=-1)) - shared
    return shared / joined.clamp(min=torch.finfo(joined.dtype).tiny)


def _area(low: Tensor, high: Tensor) -> Tensor:
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height
