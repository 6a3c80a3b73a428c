"""The paper's DETR in plain torch: the oracle that the fast model and its training are held against.

Written for being obvious, not fast: nn.MultiheadAttention with materialised weights, frozen batch norm as its own
operations, one image after another in the matching, one layer after another in the loss. Parameters carry
facebookresearch's names. Nothing here comes from `detr_fast`. (Carion et al. 2020.)
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
TERM_WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
NO_OBJECT_WEIGHT = 0.1


class FixedNorm(nn.Module):
    """Batch norm whose statistics and affine terms are constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer[:, None, None] for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Block(nn.Module):
    """ResNet's bottleneck, stride and dilation in its 3x3 convolution (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), FixedNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FixedNorm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), FixedNorm(4 * width)
        self.downsample = nn.Sequential()
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), FixedNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class Backbone(nn.Module):
    """ResNet up to its last stage; with `dilation` (DC5) that stage keeps its stride for dilation."""

    def __init__(self, name: str, dilation: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), FixedNorm(64)
        channels = 64
        for stage, blocks in enumerate(NUM_BLOCKS[name]):
            dilated = dilation and stage == 3
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if index == 0 and stage > 0 and not dilated else 1
                # the first block still sees the features of the stage before, so it is not dilated yet
                layer.append(Block(channels, 64 * 2**stage, stride, 2 if dilated and index > 0 else 1))
                channels = 256 * 2**stage
            self.add_module(f"layer{stage + 1}", layer)
        for parameter_name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter_name[:6] in ("layer2", "layer3", "layer4"))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x


def positions(padded: Tensor, dim: int) -> Tensor:
    """Sine positions (B, dim, h, w) float32 of a mask (B, h, w), True where padded: y's half, then x's (A.4)."""
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
    """What encoder and decoder layers share; tokens come first, then images, as nn.MultiheadAttention prefers."""

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
        """Tokens and positions (N, B, D), padded (B, N)."""
        attended, _ = self.self_attn(x + position, x + position, x, key_padding_mask=padded)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.feedforward(x))


class DecoderLayer(Layer):
    def forward(self, x: Tensor, queries: Tensor, memory: Tensor, position: Tensor, padded: Tensor) -> Tensor:
        """State and query positions (Q, B, D); memory and its positions (N, B, D), padded (B, N)."""
        attended, _ = self.self_attn(x + queries, x + queries, x)
        x = self.norm1(x + self.dropout(attended))
        attended, _ = self.multihead_attn(x + queries, memory + position, memory, key_padding_mask=padded)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feedforward(x))


class Stack(nn.Module):
    """Nothing but names in the state dict: `layers`, and a decoder's `norm`."""

    norm: nn.Module

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Transformer(nn.Module):
    """Encoder and decoder; the decoder's norm is for the heads alone and is not fed on."""

    def __init__(self, encoder: Stack, decoder: Stack, dim: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.decoder.norm = nn.LayerNorm(dim)

    def forward(self, source: Tensor, position: Tensor, padded: Tensor, queries: Tensor) -> list[Tensor]:
        """Tokens and positions (N, B, D), padded (B, N), query positions (Q, B, D) -> a state (B, Q, D) a layer."""
        memory = source
        for layer in self.encoder.layers:
            memory = layer(memory, position, padded)
        state, states = torch.zeros_like(queries), []
        for layer in self.decoder.layers:
            state = layer(state, queries, memory, position, padded)
            states.append(self.decoder.norm(state).transpose(0, 1))
        return states


class ReferenceDETR(nn.Module):
    """`model(images, mask)` as `detr_fast`'s, and facebookresearch's names in its state dict."""

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
    ) -> None:
        super().__init__()
        sizes = (dim, heads, feedforward, dropout)
        encoder = Stack(EncoderLayer(*sizes, decoder=False) for _ in range(encoder_layers))
        decoder = Stack(DecoderLayer(*sizes, decoder=True) for _ in range(decoder_layers))
        self.transformer = Transformer(encoder, decoder, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.bbox_embed = Stack(nn.Linear(dim, size) for size in (dim, dim, 4))
        self.query_embed = nn.Embedding(num_queries, dim)
        self.input_proj = nn.Conv2d(2048, dim, 1)
        self.backbone = nn.Sequential(nn.Sequential(OrderedDict(body=Backbone(backbone, dilation))))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        """Images (B, 3, H, W), mask (B, H, W) True where padded -> logits (B, Q, C+1), boxes_cxcywh (B, Q, 4)."""
        features = self.input_proj(self.backbone(images))
        padded = F.interpolate(mask[None].float(), size=features.shape[-2:])[0].bool()
        position = positions(padded, features.shape[1]).to(features.dtype).flatten(2).permute(2, 0, 1)  # (N, B, D)
        queries = self.query_embed.weight[:, None].expand(-1, images.shape[0], -1)  # (Q, B, D)
        states = self.transformer(features.flatten(2).permute(2, 0, 1), position, padded.flatten(1), queries)
        *early, last = [self.heads(state) for state in states]
        return {**last, "aux_outputs": early}

    def heads(self, state: Tensor) -> dict[str, Tensor]:
        """Normed states (B, Q, D) -> logits (B, Q, C+1) and boxes_cxcywh (B, Q, 4)."""
        first, second, third = self.bbox_embed.layers
        boxes = third(F.relu(second(F.relu(first(state))))).sigmoid()
        return {"pred_logits": self.class_embed(state), "pred_boxes": boxes}


def corners(boxes_cxcywh: Tensor) -> Tensor:
    x, y, width, height = boxes_cxcywh.unbind(-1)
    return torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)


def pairwise_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """(A, 4) and (B, 4) -> (A, B) generalized IoU (Rezatofighi et al. 2019)."""
    a, b = a_xyxy[:, None], b_xyxy[None]
    overlap = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union - (hull - union) / hull


@torch.no_grad()
def match_image(logits: Tensor, boxes_cxcywh: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (Q, C+1) and boxes (Q, 4) of one image -> matched queries and targets, (min(Q, T),) each."""
    class_cost = -logits.softmax(-1)[:, target["labels"]]
    l1_cost = torch.cdist(boxes_cxcywh, target["boxes"].to(boxes_cxcywh.dtype), p=1)
    giou_cost = -pairwise_giou(corners(boxes_cxcywh), corners(target["boxes"]))
    queries, targets = linear_sum_assignment((class_cost + 5 * l1_cost + 2 * giou_cost).cpu())
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)


def layer_losses(output: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The three losses of one decoder layer, not yet weighted, each layer matched anew."""
    logits, boxes_cxcywh = output["pred_logits"], output["pred_boxes"]
    no_object = logits.shape[-1] - 1
    labels = torch.full(logits.shape[:2], no_object, device=logits.device)
    num_boxes = max(1, sum(len(target["labels"]) for target in targets))
    l1 = giou = boxes_cxcywh.new_zeros(())
    for image, target in enumerate(targets):
        queries, chosen = match_image(logits[image], boxes_cxcywh[image], target)
        labels[image, queries] = target["labels"][chosen]
        predicted, wanted = boxes_cxcywh[image, queries], target["boxes"][chosen].to(boxes_cxcywh.dtype)
        l1 = l1 + (predicted - wanted).abs().sum()
        giou = giou + (1 - pairwise_giou(corners(predicted), corners(wanted)).diagonal()).sum()
    class_weight = torch.ones(no_object + 1, dtype=logits.dtype, device=logits.device)
    class_weight[no_object] = NO_OBJECT_WEIGHT
    loss_ce = F.cross_entropy(logits.transpose(1, 2), labels, class_weight)
    return {"loss_ce": loss_ce, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def reference_criterion(outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every loss under DETR's names, `_0`, `_1`, ... for the earlier layers, and `loss`, their weighted sum (1/5/2)."""
    terms = layer_losses(outputs, targets)
    for index, output in enumerate(outputs["aux_outputs"]):
        terms |= {f"{name}_{index}": value for name, value in layer_losses(output, targets).items()}
    loss = sum(value * TERM_WEIGHTS[name.rstrip("_0123456789")] for name, value in terms.items())
    return {**terms, "loss": torch.as_tensor(loss)}
