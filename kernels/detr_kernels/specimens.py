"""Shapes of DETR-R50 on 16 images of 800x1066, by which launches are compiled for GPUs that are not there."""

from collections.abc import Iterator

import torch
from torch import Tensor

IMAGES, QUERIES, LAYERS, DIM, HEADS, CLASSES, TARGETS = 16, 100, 6, 256, 8, 91, 63
TOKENS = 25 * 34
"""Tokens of one 800x1066 image at stride 32."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Make a tensor of which only shape and dtype exist."""
    return torch.empty(shape, dtype=dtype, device="meta")


def predictions_and_targets() -> Iterator[tuple[Tensor, ...]]:
    """Yield logits and boxes of every layer, labels and boxes of the targets, with logits in float32 and in bf16."""
    boxes = meta(LAYERS, IMAGES, QUERIES, 4, dtype=torch.float32)
    target_boxes = meta(IMAGES, TARGETS, 4, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        logits = meta(LAYERS, IMAGES, QUERIES, CLASSES + 1, dtype=dtype)
        yield logits, boxes, meta(IMAGES, TARGETS, dtype=torch.int64), target_boxes
