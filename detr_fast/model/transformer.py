"""DETR's transformer: post-norm, positions added to queries and keys of every attention (Carion et al. 2020, A.3)."""

from typing import NamedTuple

from detr_kernels import ROW_BACKENDS, Packing, fused_add_layer_norm, relu_dropout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fast.model.attention import AttentionMask, MultiheadAttention
from detr_fast.model.backends import Selectable


class PostNormLayer(Selectable):
    """Base of encoder and decoder layers: self-attention, feed-forward, a residual and a norm around each."""

    operations = ("layer_norm", "dropout")

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def add_norm(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Compute norm(residual + dropout(x))."""
        backends = (self.backend(name) for name in self.operations)
        return fused_add_layer_norm(
            x, residual, norm.weight, norm.bias, norm.eps, self.dropout.p, self.training, *backends
        )

    def feedforward(self, x: Tensor) -> Tensor:
        backend = self.backend("dropout")
        return self.linear2(relu_dropout(self.linear1(x), self.dropout.p, self.training, backend))


class EncoderLayer(PostNormLayer):
    """Self-attention over the image's tokens, then feed-forward."""

    def forward(self, source: Tensor, position: Tensor, mask: AttentionMask) -> Tensor:
        """Encode tokens (B, N, D) with positions (B, N, D), padded or packed as `mask` says."""
        with_position = source + position
        source = self.add_norm(self.self_attn(with_position, with_position, source, mask), source, self.norm1)
        return self.add_norm(self.feedforward(source), source, self.norm2)


class DecoderLayer(PostNormLayer):
    """Self-attention over the queries, cross-attention to the memory, feed-forward."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__(dim, num_heads, feedforward_dim, dropout)
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        state: Tensor,
        query_position: Tensor,
        memory: Tensor,
        memory_with_position: Tensor,
        self_mask: AttentionMask,
        cross_mask: AttentionMask,
    ) -> Tensor:
        """Decode the state (B, Q, D) over the memory (B, N, D), which is given without and with positions."""
        with_position = state + query_position
        state = self.add_norm(self.self_attn(with_position, with_position, state, self_mask), state, self.norm1)
        attended = self.multihead_attn(state + query_position, memory_with_position, memory, cross_mask)
        state = self.add_norm(attended, state, self.norm2)
        return self.add_norm(self.feedforward(state), state, self.norm3)


class Encoder(nn.Module):
    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Decoder(nn.Module):
    def __init__(self, layers: list[DecoderLayer], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)


class Memory(NamedTuple):
    """The encoder's output for the tokens of all images, as the decoder reads it."""

    tokens: Tensor
    """(B, N, D); where attention takes packed tokens, those of all images one after another, padding last."""
    with_position: Tensor
    packing: Packing | None
    """The order of packed tokens; None: each image has its row."""
    padding: Tensor | None
    """(B, N) bool, True where padded, in the images' own order; None: nothing is."""

    def rows(self) -> Tensor:
        """Return the tokens (B, N, D) in the images' own order."""
        return self.tokens if self.packing is None else self.packing.unpack(self.tokens.flatten(0, 1))

    def masks(self, num_queries: int, sets: int = 1) -> tuple[AttentionMask, AttentionMask]:
        """Return which queries and which tokens each of `num_queries` queries of an image attends to.

        Of `sets` sets of queries, one after another, each attends to its own queries alone.
        """
        if self.packing is None:
            return AttentionMask(sets=sets), AttentionMask(self.padding)
        images, device = self.packing.images, self.tokens.device
        own = Packing.uniform(images * sets, num_queries // sets, device)
        queries = own if sets == 1 else Packing.uniform(images, num_queries, device)
        return AttentionMask.of(own, own, sets), AttentionMask.of(queries, self.packing)


class Transformer(Selectable):
    """Encoder over the image's tokens, decoder over the queries."""

    operations = ("attention",)

    def __init__(
        self, dim: int, num_heads: int, encoder_layers: int, decoder_layers: int, feedforward_dim: int, dropout: float
    ) -> None:
        super().__init__()
        sizes = (dim, num_heads, feedforward_dim, dropout)
        self.encoder = Encoder([EncoderLayer(*sizes) for _ in range(encoder_layers)])
        self.decoder = Decoder([DecoderLayer(*sizes) for _ in range(decoder_layers)], dim)
        self.checkpoint_activations = False
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @property
    def packed(self) -> bool:
        """Tell whether the attention backend takes packed tokens."""
        return self.backend("attention") not in ("auto", *ROW_BACKENDS)

    def encode(self, source: Tensor, padding: Tensor | None, position: Tensor) -> Memory:
        """Encode tokens (B, N, D) with padding (B, N); `position` is (B, N, D), or without padding (1, N, D).

        Where attention takes packed tokens, they are packed once, here: attention needs no order of the memory's.
        """
        mask, packing = AttentionMask(padding), None
        if self.packed:
            images, count = source.shape[:2]
            packing = Packing.uniform(images, count, source.device) if padding is None else Packing.of(padding)
            if padding is not None:
                source, position = (packing.pack(x).view(x.shape) for x in (source, position))
            mask = AttentionMask.of(packing, packing)
        for layer in self.encoder.layers:
            source = self._run(layer, source, position, mask)
        return Memory(source, source + position, packing, padding)

    def decode_layer(
        self,
        index: int,
        state: Tensor,
        position: Tensor,
        memory: Memory,
        masks: tuple[AttentionMask, AttentionMask],
    ) -> tuple[Tensor, Tensor]:
        """Run decoder layer `index` on the state (B, Q, D) with the queries' positions, (Q, D) or (B, Q, D).

        Returns the next layer's state, and that state normed, for the heads. `masks` are the memory's for Q queries.
        """
        layer = self.decoder.layers[index]
        state = self._run(layer, state, position, memory.tokens, memory.with_position, *masks)
        return state, self.decoder.norm(state)

    def _run(self, layer: nn.Module, *inputs: Tensor | AttentionMask) -> Tensor:
        if self.checkpoint_activations and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
