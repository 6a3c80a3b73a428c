"""Sine position encoding over two axes, relative to each image's own size (DETR, Carion et al. 2020, A.4)."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_position_encoding(mask: Tensor, dim: int) -> Tensor:
    """Encode the positions of a mask (B, h, w), True where padded, as (B, h, w, dim) float32.

    The first half of the channels encodes y, the second x; in each half sine and cosine alternate.
    """
    inside = (~mask).float()
    half = dim // 2
    channel = torch.arange(half, device=mask.device, dtype=torch.float32)
    period = TEMPERATURE ** (2 * channel.div(2, rounding_mode="floor") / half)
    encoded = []
    for axis in (1, 2):
        position = inside.cumsum(axis)
        last = position.select(axis, -1).unsqueeze(axis) + 1e-6
        angle = (position / last * (2 * math.pi))[..., None] / period  # (B, h, w, half)
        encoded.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(3))
    return torch.cat(encoded, dim=3)
