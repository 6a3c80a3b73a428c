"""The paper's DETR in plain torch: the reference that the fast model and its training are held against.

Written for being obvious, not fast: nn.MultiheadAttention with materialised weights, one layer after another. What can
be otherwise than in the paper is one of `Choices`, beside whose defaults nothing differs. Parameters carry
facebookresearch's names. Nothing of the model here or beside it comes from `detr_fast`. (Carion et al. 2020.)
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_profiling.reference.backbones import build_backbone, side_by_side
from detr_profiling.reference.queries import (
    Choices,
    LearnedBoxes,
    Perceptron,
    QuerySelection,
    Stack,
    Start,
    box_sines,
    corrected,
    sines,
    token_boxes,
)


def positions(padded: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Compute sine positions (B, dim, h, w) float32 of a mask (B, h, w), True where padded: y's, then x's (A.4)."""
    inside = (~padded).to(torch.float32)
    halves = []
    for axis in (1, 2):
        coordinate = inside.cumsum(axis)
        coordinate = coordinate / (coordinate.narrow(axis, -1, 1) + 1e-6)
        halves.append(sines(coordinate, dim // 2, temperature))
    return torch.cat(halves, -1).permute(0, 3, 1, 2)


class Layer(nn.Module):
    """Holds what encoder and decoder layers have in common.

    Tokens come first, then images, as nn.MultiheadAttention prefers.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float, decoder: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout)
        if decoder:
            self.multihead_attn = nn.MultiheadAttention(dim, heads, dropout)
            self.norm3 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def feedforward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class EncoderLayer(Layer):
    def forward(self, x: Tensor, position: Tensor, padded: Tensor) -> Tensor:
        """Encode tokens, with their positions (N, B, D), padded (B, N)."""
        attended, _ = self.self_attn(x + position, x + position, x, key_padding_mask=padded)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.feedforward(x))


class DecoderLayer(Layer):
    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, position: Tensor, padded: Tensor) -> Tensor:
        """Decode states, with query positions (Q, B, D), from memory and its positions (N, B, D), padded (B, N)."""
        attended, _ = self.self_attn(x + queries, x + queries, x)
        x = self.norm1(x + self.dropout(attended))
        attended, _ = self.multihead_attn(x + queries, memory + position, memory, key_padding_mask=padded)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feedforward(x))


class Transformer(nn.Module):
    """Holds encoder and decoder; the decoder's norm is for the heads alone and is not fed on."""

    def __init__(self, encoder: Stack, decoder: Stack, dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.decoder.norm = nn.LayerNorm(dim)


class ReferenceDETR(nn.Module):
    """Computes `model(images, mask)` as `detr_fast`'s DETR does, with facebookresearch's names in its state dict."""

    def __init__(
        self,
        backbone: str = "resnet50",
        dilation: bool = False,
        num_classes: int = 91,
        num_queries: int = 100,
        dim: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        choices: Choices | None = None,
    ) -> None:
        """Build it with random weights on a `backbone` resnet50, resnet101, tiny or of timm.

        `choices`: what is otherwise than in the paper; default: nothing.
        """
        super().__init__()
        self.choices = choices = choices or Choices()
        self.num_queries = num_queries
        sizes = (dim, heads, feedforward, dropout)
        encoder = Stack(EncoderLayer(*sizes, decoder=False) for _ in range(encoder_layers))
        decoder = Stack(DecoderLayer(*sizes, decoder=True) for _ in range(decoder_layers))
        self.transformer = Transformer(encoder, decoder, dim)
        num_logits = num_classes + 1 if choices.scores == "softmax" else num_classes
        many = decoder_layers if choices.layer_heads else 1
        class_heads = [nn.Linear(dim, num_logits) for _ in range(many)]
        box_heads = [Perceptron(dim, dim, dim, 4) for _ in range(many)]
        self.class_embed: Any = nn.ModuleList(class_heads) if choices.layer_heads else class_heads[0]
        self.bbox_embed: Any = nn.ModuleList(box_heads) if choices.layer_heads else box_heads[0]
        if choices.query_positions == "learned":
            self.query_embed = nn.Embedding(num_queries, dim)
        else:
            self.query_position = Perceptron(2 * dim, dim, dim)
        if choices.queries == "encoder":
            self.query_selection = QuerySelection(dim, num_logits, num_queries)
        elif choices.corrects_boxes:
            self.query_boxes = LearnedBoxes(num_queries)
        body = build_backbone(backbone, dilation, choices.map_strides, choices.fold_norms)
        self.input_proj = nn.Conv2d(body.out_channels, dim, 1)
        self.input_norm = nn.LayerNorm(dim) if choices.token_norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Sequential(OrderedDict(body=body)))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        """Detect in images (B, 3, H, W), mask (B, H, W) True where padded.

        Returns `pred_logits` (B, Q, C+1), of sigmoid scores (B, Q, C), `pred_boxes` cxcywh (B, Q, 4), `aux_outputs`,
        the same of the earlier layers, and where the encoder proposes `enc_outputs`, the same of every token.
        """
        height, width = images.shape[2:]
        step = self.choices.size_divisible
        below, right = (math.ceil(side / step) * step - side for side in (height, width))
        images = F.pad(images, (0, right, 0, below))
        mask = F.pad(mask.float(), (0, right, 0, below), value=1.0).bool()
        maps, strides = self.backbone(images), self.choices.map_strides
        ordered = [maps[sorted(strides).index(stride)] for stride in strides] or maps
        features = self.input_proj(side_by_side(ordered, strides))
        dim, height, width = features.shape[1:]
        padded = F.interpolate(mask[None].float(), size=(height, width))[0].bool()
        position = positions(padded, dim, self.choices.position_temperature)
        position = position.to(features.dtype).flatten(2).permute(2, 0, 1)  # (N, B, D)
        padded = padded.flatten(1)  # (B, N)
        source = self.input_norm(features.flatten(2).permute(2, 0, 1))  # (N, B, D)
        memory = source + position if self.choices.source_position else source
        for layer in self.transformer.encoder.layers:
            memory = layer(memory, position, padded)
        if self.choices.queries == "encoder":
            start = self.query_selection(memory, token_boxes(mask, height, width), padded)
        else:
            boxes = self.query_boxes(len(images)) if self.choices.corrects_boxes else None
            start = Start(memory.new_zeros(self.num_queries, len(images), dim), boxes, None)
        *early, last = self.decode(start, memory, position, padded)
        encoder = {} if start.proposals is None else {"enc_outputs": start.proposals}
        return {**last, "aux_outputs": early, **encoder}

    def decode(self, start: Start, memory: Tensor, position: Tensor, padded: Tensor) -> list[dict[str, Tensor]]:
        """Decode memory and positions (N, B, D), padded (B, N): each layer's `pred_logits` and `pred_boxes`."""
        state, boxes, outputs = start.state, start.boxes_cxcywh, []
        for index, layer in enumerate(self.transformer.decoder.layers):
            state = layer(state, self.positions_of(boxes, state), memory, position, padded)
            normed = self.transformer.decoder.norm(state).transpose(0, 1)  # (B, Q, D)
            class_head = self.class_embed[index] if self.choices.layer_heads else self.class_embed
            box_head = self.bbox_embed[index] if self.choices.layer_heads else self.bbox_embed
            change = box_head(normed)
            found = change.sigmoid() if boxes is None else corrected(boxes, change)
            outputs.append({"pred_logits": class_head(normed), "pred_boxes": found})
            if self.choices.box_refinement:
                boxes = found.detach()
        return outputs

    def positions_of(self, boxes: Tensor | None, state: Tensor) -> Tensor:
        """Return the queries' positions (Q, B, D): learned, or made of boxes (B, Q, 4)."""
        if boxes is None or self.choices.query_positions == "learned":
            return self.query_embed.weight[:, None].expand(-1, state.shape[1], -1)
        encoded = box_sines(boxes, state.shape[-1], self.choices.position_temperature)
        return self.query_position(encoded.to(state.dtype)).transpose(0, 1)
