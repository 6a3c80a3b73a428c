"""The network: backbone, transformer, class and box heads (DETR, Carion et al. 2020, section 3.2)."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.config import ModelConfig
from detr_fast.model.backbone import build_backbone
from detr_fast.model.backends import Selectable
from detr_fast.model.position_encoding import sine_position_encoding
from detr_fast.model.transformer import Transformer
from detr_fast.profiler_ranges import profiler_range


class Predictions(NamedTuple):
    """The predictions of every decoder layer, first to last, float32."""

    logits: Tensor
    """(L, B, Q, num_classes + 1)"""
    boxes_cxcywh: Tensor
    """(L, B, Q, 4) in [0, 1] of the image without its padding"""

    def to_dict(self) -> dict[str, Any]:
        """Name the last layer's `pred_logits` and `pred_boxes`, and under `aux_outputs` those of the earlier layers."""
        layers = [{"pred_logits": a, "pred_boxes": b} for a, b in zip(*self, strict=True)]
        return {**layers[-1], "aux_outputs": layers[:-1]}

    @classmethod
    def from_dict(cls, outputs: Mapping[str, Any]) -> Self:
        """Stack what `to_dict` gives, or another implementation's mapping of the same names."""
        layers = [*outputs["aux_outputs"], outputs]
        return cls(*(torch.stack([layer[name] for layer in layers]).float() for name in ("pred_logits", "pred_boxes")))


class BoxHead(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        x = F.relu(self.layers[1](x))
        return self.layers[2](x)


class DETR(Selectable):
    """DETR: images in, a fixed set of class scores and boxes out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config.backbone, config.dilation)
        dim = config.hidden_dim
        self.input_proj = nn.Conv2d(self.backbone.out_channels, dim, 1)  # type: ignore[arg-type]
        self.transformer = Transformer(
            dim,
            config.num_heads,
            config.encoder_layers,
            config.decoder_layers,
            config.feedforward_dim,
            config.dropout,
        )
        self.query_embed = nn.Embedding(config.num_queries, dim)
        self.class_embed = nn.Linear(dim, config.num_classes + 1)
        self.bbox_embed = BoxHead(dim)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Predict from images (B, 3, H, W), normalised, and a mask (B, H, W), True where padded; None: nothing is.

        Returns `pred_logits` (B, Q, num_classes + 1), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the image without its
        padding, both float32, and under `aux_outputs` the same for the decoder's earlier layers, first to last.
        """
        return self.predict_layers(images, mask).to_dict()

    def predict_layers(self, images: Tensor, mask: Tensor | None = None) -> Predictions:
        """Predict as `forward` does, with the decoder's layers stacked."""
        with profiler_range("backbone"):
            features = self.input_proj(self.backbone(images))  # (B, D, h, w)
        size = features.shape[-2:]
        if mask is None:  # one position encoding for all images, (1, N, D)
            small_mask = torch.zeros(1, *size, dtype=torch.bool, device=features.device)
        else:
            small_mask = F.interpolate(mask[None].float(), size=size)[0].bool()  # (B, h, w), by nearest neighbour
        padding = None if mask is None else small_mask.flatten(1)  # (B, N)
        position = sine_position_encoding(small_mask, self.config.hidden_dim).flatten(1, 2).to(features.dtype)
        source = features.flatten(2).transpose(1, 2)  # (B, N, D)
        if self.config.source_position:
            source = source + position
        states = self.transformer(source, padding, self.query_embed.weight, position)  # (L, B, Q, D)
        with profiler_range("heads"):
            return Predictions(self.class_embed(states).float(), self.bbox_embed(states).float().sigmoid())
