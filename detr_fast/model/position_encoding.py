"""Sine encoding of positions, relative to each image's own size: of tokens (DETR, Carion et al. 2020, A.4), of boxes
(DAB-DETR, Liu et al. 2022, section 4.2)."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_position_encoding(mask: Tensor, dim: int, temperature: float = TEMPERATURE) -> Tensor:
    """Encode the positions of a mask (B, h, w), True where padded, as (B, h, w, dim) float32.

    The first half of the channels encodes y, the second x; in each half sine and cosine alternate.
    """
    inside = (~mask).float()
    period = periods(dim // 2, temperature, mask.device)
    encoded = []
    for axis in (1, 2):
        position = inside.cumsum(axis)
        last = position.select(axis, -1).unsqueeze(axis) + 1e-6
        encoded.append(sines(position / last, period))
    return torch.cat(encoded, dim=3)


def sine_box_encoding(boxes_cxcywh: Tensor, dim: int, temperature: float = TEMPERATURE) -> Tensor:
    """Encode boxes (..., 4) in [0, 1] as (..., 2 * dim) float32: cy, cx, w, h, each in half of `dim`."""
    x, y, width, height = boxes_cxcywh.unbind(-1)
    numbers = torch.stack((y, x, width, height), dim=-1)
    return sines(numbers, periods(dim // 2, temperature, boxes_cxcywh.device)).flatten(-2)


def periods(channels: int, temperature: float, device: torch.device) -> Tensor:
    """Compute the channels' periods (channels,), in pairs from 1 to nearly `temperature`."""
    channel = torch.arange(channels, device=device, dtype=torch.float32)
    return temperature ** (2 * channel.div(2, rounding_mode="floor") / channels)


def sines(fraction: Tensor, period: Tensor) -> Tensor:
    """Encode numbers (...) in [0, 1] as (..., channels), sine and cosine in turns, of the given periods."""
    angle = (fraction * (2 * math.pi))[..., None] / period
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)
