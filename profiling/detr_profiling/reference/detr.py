"""The paper's DETR in plain torch: the reference that the fast model and its training are held against.

Written for being obvious, not fast: nn.MultiheadAttention with materialised weights, one image after another in the
matching, one layer after another in the loss. Parameters carry facebookresearch's names. Nothing here or in
backbones.py comes from `detr_fast`. (Carion et al. 2020.)
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from detr_profiling.reference.backbones import ResNet, TinyNet

TERM_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
NO_OBJECT_WEIGHT = 0.1


def positions(padded: Tensor, dim: int) -> Tensor:
    """Compute sine positions (B, dim, h, w) float32 of a mask (B, h, w), True where padded: y's, then x's (A.4)."""
    inside = (~padded).to(torch.float32)
    index = torch.arange(dim // 2, dtype=torch.float32, device=padded.device)
    wavelength = 10000 ** (2 * (index // 2) / (dim // 2))
    halves = []
    for axis in (1, 2):
        coordinate = inside.cumsum(axis)
        coordinate = coordinate / (coordinate.narrow(axis, -1, 1) + 1e-6) * 2 * math.pi
        angle = coordinate.unsqueeze(-1) / wavelength
        halves.append(torch.where(index % 2 == 0, angle.sin(), angle.cos()))
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


class Stack(nn.Module):
    """Gives names in the state dict alone: `layers`, and a decoder's `norm`."""

    norm: nn.Module

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Transformer(nn.Module):
    """Joins encoder and decoder; the decoder's norm is for the heads alone and is not fed on."""

    def __init__(self, encoder: Stack, decoder: Stack, dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.decoder.norm = nn.LayerNorm(dim)

    def forward(self, source: Tensor, position: Tensor, padded: Tensor, queries: Tensor) -> list[Tensor]:
        """Return a state (B, Q, D) for each decoder layer.

        Takes tokens and positions (N, B, D), padded (B, N), query positions (Q, B, D).
        """
        memory = source
        for layer in self.encoder.layers:
            memory = layer(memory, position, padded)
        state, states = torch.zeros_like(queries), []
        for layer in self.decoder.layers:
            state = layer(state, queries, memory, position, padded)
            states.append(self.decoder.norm(state).transpose(0, 1))
        return states


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
        source_position: bool = False,
    ) -> None:
        """Build it with random weights on a `backbone` resnet50, resnet101 or tiny.

        `source_position`, which DETR has not, adds positions to the encoder's input too.
        """
        super().__init__()
        self.source_position = source_position
        sizes = (dim, heads, feedforward, dropout)
        encoder = Stack(EncoderLayer(*sizes, decoder=False) for _ in range(encoder_layers))
        decoder = Stack(DecoderLayer(*sizes, decoder=True) for _ in range(decoder_layers))
        self.transformer = Transformer(encoder, decoder, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = Stack(nn.Linear(dim, size) for size in (dim, dim, 4))
        self.query_embed = nn.Embedding(num_queries, dim)
        body = TinyNet() if backbone == "tiny" else ResNet(backbone, dilation)
        self.input_proj = nn.Conv2d(body.out_channels, dim, 1)
        self.backbone = nn.Sequential(nn.Sequential(OrderedDict(body=body)))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        """Detect in images (B, 3, H, W), mask (B, H, W) True where padded.

        Returns `pred_logits` (B, Q, C+1), `pred_boxes` cxcywh (B, Q, 4), and `aux_outputs`, the same of
        the earlier layers.
        """
        features = self.input_proj(self.backbone(images))
        padded = F.interpolate(mask[None].float(), size=features.shape[-2:])[0].bool()
        position = positions(padded, features.shape[1]).to(features.dtype).flatten(2).permute(2, 0, 1)  # (N, B, D)
        queries = self.query_embed.weight[:, None].expand(-1, images.shape[0], -1)  # (Q, B, D)
        source = features.flatten(2).permute(2, 0, 1)  # (N, B, D)
        source = source + position if self.source_position else source
        states = self.transformer(source, position, padded.flatten(1), queries)
        *early, last = [self.heads(state) for state in states]
        return {**last, "aux_outputs": early}

    def heads(self, state: Tensor) -> dict[str, Tensor]:
        """Map normed states (B, Q, D) to logits (B, Q, C+1) and boxes cxcywh (B, Q, 4)."""
        first, second, third = self.bbox_embed.layers
        boxes = third(F.relu(second(F.relu(first(state))))).sigmoid()
        return {"pred_logits": self.class_embed(state), "pred_boxes": boxes}


def corners(boxes_cxcywh: Tensor) -> Tensor:
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)


def pairwise_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU (A, B) of boxes (A, 4) and (B, 4) (Rezatofighi et al. 2019)."""
    a, b = a_xyxy[:, None], b_xyxy[None]
    overlap = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union - (hull - union) / hull


def image_cost(logits: Tensor, boxes_cxcywh: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Compute the cost (Q, T) of each pair from one image's logits (Q, C+1) and boxes (Q, 4)."""
    class_cost = -logits.softmax(-1)[:, target["labels"]]
    l1_cost = torch.cdist(boxes_cxcywh, target["boxes"].to(boxes_cxcywh.dtype), p=1)
    giou_cost = -pairwise_giou(corners(boxes_cxcywh), corners(target["boxes"]))
    return class_cost + 5 * l1_cost + 2 * giou_cost


@torch.no_grad()
def match_image(logits: Tensor, boxes_cxcywh: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Match one image's logits (Q, C+1) and boxes (Q, 4): queries and targets, (min(Q, T),) each."""
    queries, targets = linear_sum_assignment(image_cost(logits, boxes_cxcywh, target).cpu())
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)


Matches = Sequence[tuple[Tensor, Tensor]]
"""For each image the matched queries and their targets."""


def layer_losses(output: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Compute the three losses of one decoder layer, not yet weighted, each layer matched anew."""
    images = zip(output["pred_logits"], output["pred_boxes"], targets, strict=True)
    return matched_losses(output, targets, [match_image(logits, boxes, target) for logits, boxes, target in images])


def matched_losses(output: dict[str, Any], targets: Sequence[dict[str, Tensor]], matches: Matches) -> dict[str, Tensor]:
    logits, boxes_cxcywh = output["pred_logits"], output["pred_boxes"]
    no_object = logits.shape[-1] - 1
    labels = torch.full(logits.shape[:2], no_object, device=logits.device)
    num_boxes = max(1, sum(len(target["labels"]) for target in targets))
    l1 = giou = boxes_cxcywh.new_zeros(())
    for image, (target, (queries, chosen)) in enumerate(zip(targets, matches, strict=True)):
        labels[image, queries] = target["labels"][chosen]
        predicted, wanted = boxes_cxcywh[image, queries], target["boxes"][chosen].to(boxes_cxcywh.dtype)
        l1 = l1 + (predicted - wanted).abs().sum()
        giou = giou + (1 - pairwise_giou(corners(predicted), corners(wanted)).diagonal()).sum()
    class_weight = torch.ones(no_object + 1, dtype=logits.dtype, device=logits.device)
    class_weight[no_object] = NO_OBJECT_WEIGHT
    loss_ce = F.cross_entropy(logits.transpose(1, 2), labels, class_weight)
    return {"loss_ce": loss_ce, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def weighted_terms(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight `terms` 1/5/2, and add `loss`, their sum."""
    loss = sum(value * TERM_WEIGHTS[name.rstrip("_0123456789")] for name, value in terms.items())
    return {**terms, "loss": torch.as_tensor(loss)}


def reference_criterion(outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Compute every loss under DETR's names, `_0`, `_1`, ... for the earlier layers, and `loss`, their weighted sum."""
    terms = layer_losses(outputs, targets)
    for index, output in enumerate(outputs["aux_outputs"]):
        terms |= {f"{name}_{index}": value for name, value in layer_losses(output, targets).items()}
    return weighted_terms(terms)
