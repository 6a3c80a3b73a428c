"""Queries that a decoder starts from, learned or the encoder's best tokens, and the correction of boxes.

Every token of the memory proposes a class and a box, has a loss of its own, and the best of an image become its queries
(Deformable DETR, Zhu et al. 2021, A.4; DINO, Zhang et al. 2023). All shapes follow from the images' alone.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from detr_kernels.loss.boxes import at_least_float32
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.config import ModelConfig, require
from detr_fast.model.backbone import token_stride
from detr_fast.model.backends import Selectable
from detr_fast.profiler_ranges import profiler_range

ANCHOR_CELLS = 4.0
"""Side of the box that a token's proposal corrects, in tokens."""
PADDED_LOGIT = -100.0
"""Class logit of a token of padding: its score, its loss and its gradient are zero."""
PRIOR = 0.01
"""Score that a sigmoid class head begins with, so that the many queries without an object start right."""
EPS = 1e-5
"""Least distance of a box's numbers from 0 and 1 where their logit is taken."""


class MLP(nn.Module):
    """Linear layers of the given widths with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


class LayerHeads(nn.ModuleList):
    """One head for each decoder layer: states (L, B, Q, D) -> (L, B, Q, .)."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.stack([head(state) for head, state in zip(self, states, strict=True)])


def class_head(dim: int, logits: int, sigmoid: bool) -> nn.Linear:
    """Make a class head; of sigmoid scores, all begin at `PRIOR`."""
    head = nn.Linear(dim, logits)
    if sigmoid:
        nn.init.constant_(head.bias, math.log(PRIOR / (1 - PRIOR)))
    return head


def box_head(dim: int, corrects: bool) -> MLP:
    """Make a box head; one that corrects boxes begins by leaving them as they are."""
    head = MLP(dim, dim, dim, 4)
    if corrects:
        for parameter in head.layers[-1].parameters():
            nn.init.zeros_(parameter)
    return head


def corrected(boxes_cxcywh: Tensor, change: Tensor) -> Tensor:
    """Move boxes (..., 4) in [0, 1] by `change` in logits; float32 at least."""
    change = at_least_float32(change)
    return torch.sigmoid(change + torch.logit(boxes_cxcywh.to(change.dtype), eps=EPS))


class Proposals(NamedTuple):
    """The proposals of every token of the memory, float32 at least."""

    logits: Tensor
    """(B, N, num_logits)"""
    boxes_cxcywh: Tensor
    """(B, N, 4) in [0, 1] of the image without its padding"""


class Tokens(NamedTuple):
    """The encoder's output, as queries are made from it."""

    rows: Tensor
    """(B, N, D)"""
    anchors: Tensor | None = None
    """(B or 1, N, 4), the box that each token's proposal corrects; None: tokens propose nothing."""
    padding: Tensor | None = None
    """(B, N) bool, True where padded; None: nothing is."""


class Queries(NamedTuple):
    """One set of queries, as the decoder starts from it."""

    state: Tensor
    """(B, Q, D)"""
    boxes_cxcywh: Tensor | None = None
    """(B, Q, 4), without gradient but where they are learned; None: the decoder's boxes correct none."""
    position: Tensor | None = None
    """(Q, D) or (B, Q, D), the same for all layers; None: each layer makes it from the boxes that it corrects."""
    proposals: Proposals | None = None
    """Those of the tokens that the queries were chosen from."""
    denoises: bool = False
    """The queries are noised targets, each with its own target: they are not matched."""


def joined(sets: Sequence[Queries]) -> Queries:
    """Lay S sets of Q queries one after another: (B, S * Q, .)."""
    if len(sets) == 1:
        return sets[0]
    images = len(sets[0].state)
    boxes = [each.boxes_cxcywh for each in sets if each.boxes_cxcywh is not None]
    positions = [each.position.expand(images, -1, -1) for each in sets if each.position is not None]
    return Queries(
        torch.cat([each.state for each in sets], dim=1),
        torch.cat(boxes, dim=1) if boxes else None,
        torch.cat(positions, dim=1) if positions else None,
    )


class LearnedBoxes(nn.Module):
    """A box for each query that is the same for every image (DAB-DETR's anchors)."""

    def __init__(self, num_queries: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(num_queries, 4))
        with torch.no_grad():
            self.logits.copy_(torch.logit(torch.rand(num_queries, 4), eps=0.02))

    def forward(self, images: int) -> Tensor:
        return at_least_float32(self.logits).sigmoid().expand(images, -1, -1)


class QuerySelection(nn.Module):
    """Proposes a class and a box from every token of the memory; the best tokens of an image become its queries."""

    def __init__(self, dim: int, num_logits: int, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_embed = class_head(dim, num_logits, sigmoid=True)
        self.bbox_embed = box_head(dim, corrects=True)

    @torch.no_grad()
    def begin_at(self, sizes: Tensor, anchors: Tensor) -> None:
        """Begin with proposals of the median of objects' `sizes` (M, 2), beside the `anchors` (M, 2) of their images.

        Both are widths and heights in fractions of the image.
        """
        change = torch.logit(sizes, eps=EPS) - torch.logit(anchors, eps=EPS)
        self.bbox_embed.layers[-1].bias[2:] = change.median(0).values

    @torch.no_grad()
    def begin_like(self, other: "QuerySelection") -> None:
        """Begin with proposals of the size that another's have without their tokens."""
        self.bbox_embed.layers[-1].bias.copy_(other.bbox_embed.layers[-1].bias)

    def forward(self, tokens: Tensor, anchors: Tensor, padding: Tensor | None) -> Queries:
        """Choose of tokens (B, N, D), with anchors (B or 1, N, 4) and padding (B, N); at most N queries an image."""
        tokens = self.norm(self.linear(tokens))
        logits = at_least_float32(self.class_embed(tokens))
        if padding is not None:
            logits = logits.masked_fill(padding[..., None], PADDED_LOGIT)
        boxes = corrected(anchors, self.bbox_embed(tokens))
        best = logits.detach().amax(-1).topk(min(self.num_queries, tokens.shape[1])).indices[..., None]  # (B, Q, 1)
        chosen = [each.detach().gather(1, best.expand(-1, -1, each.shape[-1])) for each in (tokens, boxes)]
        return Queries(chosen[0], chosen[1], proposals=Proposals(logits, boxes))


class QuerySource(Selectable):
    """Makes one set of queries from the encoder's tokens: base of the network, whose set is the first."""

    query_selection: QuerySelection
    query_boxes: LearnedBoxes
    query_embed: nn.Embedding

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def add_query_parts(self) -> None:
        """Make what a set of queries has of its own."""
        config = self.config
        if config.queries == "encoder":
            step = token_stride(config)
            require(
                config.size_divisible % step == 0,
                f"Tokens that propose boxes have to be whole, {step} pixels wide: give --size-divisible {step}, or a "
                "multiple of it.",
            )
            self.query_selection = QuerySelection(config.hidden_dim, config.num_logits, config.num_queries)
        elif config.corrects_boxes:
            self.query_boxes = LearnedBoxes(config.num_queries)
        if config.query_positions == "learned":
            self.query_embed = nn.Embedding(config.num_queries, config.hidden_dim)

    def queries(self, tokens: Tokens) -> Queries:
        """Make the set: learned, or chosen from the tokens."""
        if tokens.anchors is not None:
            with profiler_range("queries"):
                return self.query_selection(tokens.rows, tokens.anchors, tokens.padding)
        images, _, dim = tokens.rows.shape
        with profiler_range("decoder"):
            state = tokens.rows.new_zeros(images, self.config.num_queries, dim)
            boxes = self.query_boxes(images) if self.config.corrects_boxes else None
            return Queries(state, boxes, self.query_embed.weight if self.config.query_positions == "learned" else None)


def token_anchors(size_hw: tuple[int, int], padded_hw: tuple[int, int], mask: Tensor | None, like: Tensor) -> Tensor:
    """Make a box around each of h * w tokens, (B or 1, N, 4) cxcywh float32, in fractions of the unpadded image.

    `mask` (B, H, W), True where padded, is of the images of `padded_hw`, a whole number of tokens; None: nothing is.
    """
    sides, centers = [], []
    for axis, (tokens, pixels) in enumerate(zip(size_hw, padded_hw, strict=True), start=1):
        if mask is None:
            extent = torch.full((1,), float(tokens), device=like.device)
        else:
            extent = (~mask).any(3 - axis).sum(1).float() * (tokens / pixels)  # tokens of the image itself
        extent = extent.clamp(min=1)[:, None]
        centers.append((torch.arange(tokens, device=like.device) + 0.5) / extent)  # (B or 1, h or w)
        sides.append(ANCHOR_CELLS / extent)
    height, width = size_hw
    grids = (centers[1][:, None, :], centers[0][:, :, None], sides[1][:, :, None], sides[0][:, :, None])
    boxes = torch.stack([each.expand(-1, height, width) for each in grids], dim=-1)
    return boxes.flatten(1, 2).clamp(max=1)
