"""Further sets of queries, in training alone: groups, and noised targets to be denoised.

A group is a set with queries of its own, matched by itself (Group DETR, Chen et al. 2023). A denoising set has targets
for queries, moved and some of another class, which learn to find back without any matching (DN-DETR, Li et al. 2022).
Neither sees another set, so the network decodes its own as it would alone.
"""

from typing import Any, NamedTuple

from torch import Tensor, nn

from detr_fast.config import ModelConfig
from detr_fast.model.position_encoding import sine_box_encoding
from detr_fast.model.queries import MLP, Queries, QuerySource, Tokens
from detr_fast.profiler_ranges import profiler_range


class NoisedTargets(NamedTuple):
    """Queries of G denoising sets, before they are embedded."""

    labels: Tensor
    """(B, G, Q) int64"""
    boxes_cxcywh: Tensor
    """(B, G, Q, 4) float32 in [0, 1]"""


class QuerySets(nn.Module):
    """Makes the further sets of a network, with weights of their own, of which the network itself needs none."""

    def __init__(self, config: ModelConfig, groups: int = 1, denoising: int = 0) -> None:
        """Make `groups` sets that are matched, the network's own among them, and so many that denoise."""
        super().__init__()
        self.config = config
        self.denoising = denoising
        further = [QuerySource(config) for _ in range(groups - 1)]
        for group in further:
            group.add_query_parts()
        self.groups: Any = nn.ModuleList(further)
        if denoising:
            self.label_embed = nn.Embedding(config.num_classes, config.hidden_dim)
            if config.query_positions == "learned":
                self.box_position = MLP(2 * config.hidden_dim, config.hidden_dim, config.hidden_dim)

    def forward(self, first: Queries, tokens: Tokens, noised: NoisedTargets | None = None) -> list[Queries]:
        """Make the groups after the network's `first` one from `tokens`, and the denoising sets, of as many queries."""
        groups = [group.queries(tokens) for group in self.groups]
        return groups if noised is None else [*groups, *self.denoising_sets(first, noised)]

    def denoising_sets(self, first: Queries, noised: NoisedTargets) -> list[Queries]:
        """Embed noised targets: the label is a query's content, the box what it starts from and its position."""
        count = first.state.shape[1]
        with profiler_range("queries"):
            labels, boxes = noised.labels[:, :, :count], noised.boxes_cxcywh[:, :, :count]
            states = self.label_embed(labels).to(first.state.dtype).unbind(1)
            positions = [None] * self.denoising
            if first.position is not None:
                encoded = sine_box_encoding(boxes, self.config.hidden_dim, self.config.position_temperature)
                positions = self.box_position(encoded.to(first.state.dtype)).to(first.position.dtype).unbind(1)
            starts = [None] * self.denoising if first.boxes_cxcywh is None else boxes.unbind(1)
        return [Queries(*each, denoises=True) for each in zip(states, starts, positions, strict=True)]
