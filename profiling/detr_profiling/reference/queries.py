"""The plain reference's other decoder: tokens that propose boxes, and boxes that are corrected layer by layer.

(Deformable DETR, Zhu et al. 2021, A.4; DAB-DETR, Liu et al. 2022; DINO, Zhang et al. 2023.)
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_profiling.reference.criterion import Scores


@dataclass(frozen=True)
class Choices:
    """Chooses what can be otherwise than DETR has it; see the fields of the same names in `detr_fast`'s ModelConfig."""

    token_stride: int | None = None
    feature_strides: tuple[int, ...] = ()
    size_divisible: int = 1
    fold_norms: bool = False
    token_norm: bool = False
    source_position: bool = False
    position_temperature: float = 10000.0
    queries: Literal["learned", "encoder"] = "learned"
    query_positions: Literal["learned", "boxes"] = "learned"
    box_refinement: bool = False
    layer_heads: bool = False
    scores: Scores = "softmax"

    @property
    def map_strides(self) -> list[int]:
        further = [stride for stride in self.feature_strides if stride != self.token_stride]
        return [] if self.token_stride is None else [self.token_stride, *further]

    @property
    def corrects_boxes(self) -> bool:
        return self.box_refinement or self.query_positions == "boxes"


class Stack(nn.Module):
    """Gives names in the state dict alone: `layers`, and a decoder's `norm`."""

    norm: nn.Module

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Perceptron(Stack):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def sines(numbers: Tensor, channels: int, temperature: float) -> Tensor:
    """Encode numbers (...) in [0, 1] as (..., channels): sines in even channels, cosines in odd ones."""
    index = torch.arange(channels, dtype=torch.float32, device=numbers.device)
    wavelength = temperature ** (2 * (index // 2) / channels)
    angle = numbers.unsqueeze(-1) * 2 * math.pi / wavelength
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())


def box_sines(boxes_cxcywh: Tensor, dim: int, temperature: float) -> Tensor:
    """Encode boxes (..., 4) as (..., 2 * dim): y, x, width, height."""
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.cat([sines(number, dim // 2, temperature) for number in (y, x, width, height)], -1)


def corrected(boxes_cxcywh: Tensor, change: Tensor) -> Tensor:
    """Add `change` to the logits of boxes, which are taken at least 1e-5 from 0 and 1."""
    box = boxes_cxcywh.to(torch.promote_types(boxes_cxcywh.dtype, change.dtype)).clamp(1e-5, 1 - 1e-5)
    return (torch.log(box / (1 - box)) + change).sigmoid()


def token_boxes(mask: Tensor, height: int, width: int) -> Tensor:
    """Make a box (B, h * w, 4) of 4 x 4 tokens around each, relative to the image without its padding, which `mask`
    (B, H, W) marks by True. Float32, as positions are."""
    images = []
    for padded in mask:
        rows, columns = (int((~padded).any(axis).sum()) for axis in (1, 0))
        tall = (torch.tensor(float(rows)) * (height / padded.shape[0])).clamp(min=1)  # the image's size in tokens
        wide = (torch.tensor(float(columns)) * (width / padded.shape[1])).clamp(min=1)
        size = torch.stack((wide, tall))
        boxes = [
            torch.cat((torch.tensor((column + 0.5, row + 0.5)) / size, 4 / size))
            for row in range(height)
            for column in range(width)
        ]
        images.append(torch.stack(boxes).clamp(max=1))
    return torch.stack(images).to(mask.device)


class Start(NamedTuple):
    """Holds the start of the decoder."""

    state: Tensor
    """(Q, B, D)"""
    boxes_cxcywh: Tensor | None
    """(B, Q, 4), which its layers correct; None: they correct none."""
    proposals: dict[str, Tensor] | None
    """Every token's `pred_logits` (B, N, C) and `pred_boxes` (B, N, 4)."""


class QuerySelection(nn.Module):
    """Lets every token of the memory propose a class and a box, and takes the best of each image as its queries."""

    def __init__(self, dim: int, num_logits: int, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.linear, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.class_embed, self.bbox_embed = nn.Linear(dim, num_logits), Perceptron(dim, dim, dim, 4)

    def forward(self, memory: Tensor, anchors: Tensor, padded: Tensor) -> Start:
        """Choose of memory (N, B, D), with anchors (B, N, 4), padded (B, N)."""
        tokens = self.norm(self.linear(memory.transpose(0, 1)))
        logits = self.class_embed(tokens).masked_fill(padded[..., None], -100.0)
        boxes = corrected(anchors, self.bbox_embed(tokens))
        states, chosen_boxes = [], []
        for image in range(len(tokens)):
            best = logits[image].amax(-1).topk(min(self.num_queries, len(memory))).indices
            states.append(tokens[image, best].detach())
            chosen_boxes.append(boxes[image, best].detach())
        proposals = {"pred_logits": logits, "pred_boxes": boxes}
        return Start(torch.stack(states, 1), torch.stack(chosen_boxes), proposals)


class LearnedBoxes(nn.Module):
    """A box for each query, the same for every image."""

    def __init__(self, num_queries: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_queries, 4))

    def forward(self, images: int) -> Tensor:
        return self.logits.sigmoid().expand(images, -1, -1)
