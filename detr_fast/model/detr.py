"""The network: backbone, transformer, class and box heads (DETR, Carion et al. 2020, section 3.2).

The configuration chooses where queries come from, and how boxes and scores are made; its defaults are DETR's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from detr_kernels.loss.boxes import at_least_float32
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.config import ModelConfig
from detr_fast.model.backbone import build_backbone
from detr_fast.model.feature_maps import divisible
from detr_fast.model.position_encoding import sine_box_encoding, sine_position_encoding
from detr_fast.model.queries import (
    MLP,
    LayerHeads,
    Queries,
    QuerySource,
    Tokens,
    box_head,
    class_head,
    corrected,
    joined,
    token_anchors,
)
from detr_fast.model.transformer import Memory, Transformer
from detr_fast.profiler_ranges import profiler_range


class Predictions(NamedTuple):
    """The predictions of every decoder layer, first to last, float32 or, of a float64 network, that.

    In training there may be S sets of queries. All layers of the first set come first, then all of the next.
    """

    logits: Tensor
    """(S * L, B, Q, num_logits)"""
    boxes_cxcywh: Tensor
    """(S * L, B, Q, 4) in [0, 1] of the image without its padding"""
    proposals: "Predictions | None" = None
    """Those of the encoder's tokens, as one layer, where queries are chosen from them."""
    groups: int = 1
    """Sets whose queries are matched to targets."""
    denoising: int = 0
    """Sets behind them, S - groups, whose queries are noised targets."""

    def to_dict(self) -> dict[str, Any]:
        """Name the last layer's `pred_logits` and `pred_boxes`, under `aux_outputs` those of the earlier layers, and
        under `enc_outputs` the encoder's, where there are any."""
        layers = [named_outputs(*pair) for pair in zip(self.logits, self.boxes_cxcywh, strict=True)]
        encoder = {}
        if self.proposals is not None:
            encoder = {"enc_outputs": named_outputs(self.proposals.logits[0], self.proposals.boxes_cxcywh[0])}
        return {**layers[-1], "aux_outputs": layers[:-1], **encoder}

    @classmethod
    def from_dict(cls, outputs: Mapping[str, Any]) -> Self:
        """Stack what `to_dict` gives, or another implementation's mapping of the same names."""
        layers = [*outputs["aux_outputs"], outputs]
        encoder = outputs.get("enc_outputs")
        logits, boxes = (at_least_float32(torch.stack([layer[name] for layer in layers])) for name in OUTPUTS)
        if encoder is None:
            return cls(logits, boxes)
        proposed_logits, proposed_boxes = (at_least_float32(encoder[name])[None] for name in OUTPUTS)
        proposals = cls(proposed_logits, proposed_boxes)
        return cls(logits, boxes, proposals)


OUTPUTS = ("pred_logits", "pred_boxes")


def named_outputs(logits: Tensor, boxes_cxcywh: Tensor) -> dict[str, Tensor]:
    return dict(zip(OUTPUTS, (logits, boxes_cxcywh), strict=True))


MoreQueries = Callable[[Queries, Tokens], Sequence[Queries]]
"""The network's own set of queries, and what it was made from -> further sets for it to decode, in training."""


class DETR(QuerySource):
    """DETR: images in, a fixed set of class scores and boxes out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone, config.dilation, config.map_strides, config.fold_norms)
        dim = config.hidden_dim
        self.input_proj = nn.Conv2d(self.backbone.out_channels, dim, 1)  # type: ignore[arg-type]
        self.input_norm = nn.LayerNorm(dim) if config.token_norm else None
        self.transformer = Transformer(
            dim,
            config.num_heads,
            config.encoder_layers,
            config.decoder_layers,
            config.feedforward_dim,
            config.dropout,
        )
        sigmoid, corrects = config.scores == "sigmoid", config.corrects_boxes
        self.add_query_parts()
        if config.query_positions == "boxes":
            self.query_position = MLP(2 * dim, dim, dim)
        self.class_embed: Any = self.heads(lambda: class_head(dim, config.num_logits, sigmoid))
        self.bbox_embed: Any = self.heads(lambda: box_head(dim, corrects))

    def heads(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Make the decoder's head of one kind, or one for each layer."""
        if self.config.layer_heads:
            return LayerHeads([make() for _ in range(self.config.decoder_layers)])
        return make()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Predict from images (B, 3, H, W), normalised, and a mask (B, H, W), True where padded; None: nothing is.

        Returns `pred_logits` (B, Q, num_logits), `pred_boxes` (B, Q, 4) cxcywh in [0, 1] of the image without its
        padding, and under `aux_outputs` the same for the decoder's earlier layers, first to last.
        """
        return self.predict_layers(images, mask).to_dict()

    def predict_layers(
        self, images: Tensor, mask: Tensor | None = None, more: MoreQueries | None = None
    ) -> Predictions:
        """Predict as `forward` does, with the decoder's layers stacked; `more`: of these sets of queries too."""
        with profiler_range("backbone"):
            images, mask = divisible(images, mask, self.config.size_divisible)
            features = self.input_proj(self.backbone(images))  # (B, D, h, w)
        size = features.shape[-2:]
        if mask is None:  # one position encoding for all images, (1, N, D)
            small_mask = torch.zeros(1, *size, dtype=torch.bool, device=features.device)
        else:
            small_mask = F.interpolate(mask[None].float(), size=size)[0].bool()  # (B, h, w), by nearest neighbour
        padding = None if mask is None else small_mask.flatten(1)  # (B, N)
        position = sine_position_encoding(small_mask, self.config.hidden_dim, self.config.position_temperature)
        position = position.flatten(1, 2).to(features.dtype)
        source = features.flatten(2).transpose(1, 2)  # (B, N, D)
        if self.input_norm is not None:
            source = self.input_norm(source)
        if self.config.source_position:
            source = source + position
        with profiler_range("encoder"):
            memory = self.transformer.encode(source, padding, position)
        tokens = self.tokens(memory, (*size,), (*images.shape[-2:],), mask)
        queries = self.queries(tokens)
        return self.decode(memory, [queries] if more is None else [queries, *more(queries, tokens)])

    def tokens(
        self, memory: Memory, size_hw: tuple[int, int], padded_hw: tuple[int, int], mask: Tensor | None
    ) -> Tokens:
        """Return the memory of h x w tokens as queries are made from it."""
        if self.config.queries == "learned":
            return Tokens(memory.tokens)  # of which nothing is read but the shape
        with profiler_range("queries"):
            rows = memory.rows()
            return Tokens(rows, token_anchors(size_hw, padded_hw, mask, rows), memory.padding)

    def decode(self, memory: Memory, sets: Sequence[Queries]) -> Predictions:
        """Decode layer by layer. Each layer's state is normed for the heads; the unnormed one goes on.

        Sets of queries do not see each other: (B, S * Q, D) for the memory, whose keys and values all share, they are
        (B * S, Q, D) among themselves.
        """
        start = joined(sets)
        state, boxes = start.state, start.boxes_cxcywh
        states, found = [], []
        with profiler_range("decoder"):
            masks = memory.masks(state.shape[1], len(sets))
            for index in range(self.config.decoder_layers):
                position = self.positions(start, boxes, state.dtype)
                state, normed = self.transformer.decode_layer(index, state, position, memory, masks)
                states.append(normed)
                if boxes is not None and self.config.box_refinement:
                    head = self.bbox_embed[index] if self.config.layer_heads else self.bbox_embed
                    found.append(corrected(boxes, head(normed)))
                    boxes = found[-1].detach()
        with profiler_range("heads"):
            stacked = torch.stack(states)
            logits = at_least_float32(self.class_embed(stacked))
            if found:
                decoded = torch.stack(found)
            else:
                changes = at_least_float32(self.bbox_embed(stacked))
                decoded = changes.sigmoid() if boxes is None else corrected(boxes, changes)
            return of_sets(sets, logits, decoded)

    def positions(self, start: Queries, boxes_cxcywh: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the queries' positions: those that all layers have, or made from the boxes that a layer corrects."""
        if start.position is not None:
            return start.position
        assert boxes_cxcywh is not None
        encoded = sine_box_encoding(boxes_cxcywh, self.config.hidden_dim, self.config.position_temperature)
        return self.query_position(encoded.to(dtype))


def of_sets(sets: Sequence[Queries], logits: Tensor, boxes_cxcywh: Tensor) -> Predictions:
    """Make layers of sets: what was decoded, (L, B, S * Q, .), becomes (S * L, B, Q, .)."""
    if len(sets) > 1:
        decoded = (each.unflatten(2, (len(sets), -1)) for each in (logits, boxes_cxcywh))  # (L, B, S, Q, .)
        logits, boxes_cxcywh = (each.movedim(2, 0).flatten(0, 1) for each in decoded)
    denoising = sum(each.denoises for each in sets)
    groups = len(sets) - denoising
    proposals = [each.proposals for each in sets if each.proposals is not None]
    of_tokens = None
    if proposals:
        scores, boxes = (torch.stack(each) for each in zip(*proposals, strict=True))  # (S, B, N, .)
        of_tokens = Predictions(scores, boxes, groups=groups)
    return Predictions(logits, boxes_cxcywh, of_tokens, groups, denoising)
