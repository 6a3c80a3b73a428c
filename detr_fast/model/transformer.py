"""DETR's transformer: post-norm, positions added to queries and keys of every attention (Carion et al. 2020, A.3)."""

import torch
from detr_kernels import ROW_BACKENDS, Packing, fused_add_layer_norm, relu_dropout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr_fast.model.attention import AttentionMask, MultiheadAttention
from detr_fast.model.backends import Selectable
from detr_fast.profiler_ranges import profiler_range


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


class Transformer(Selectable):
    """Encoder over the image's tokens and decoder over the queries, which start from zeros."""

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

    def forward(self, source: Tensor, padding: Tensor | None, query_position: Tensor, position: Tensor) -> Tensor:
        """Transform tokens (B, N, D) with padding (B, N) and query positions (Q, D) into normed states (L, B, Q, D).

        `position` is (B, N, D), or without padding (1, N, D). Each layer's state is normed for the heads; the unnormed
        one goes on to the next layer. Where attention takes packed tokens, they are packed once, here: nothing after
        the encoder needs the order of the memory's tokens.
        """
        encoder_mask, self_mask, cross_mask = AttentionMask(padding), AttentionMask(), AttentionMask(padding)
        with profiler_range("encoder"):
            if self.packed:
                images, count = source.shape[:2]
                tokens = Packing.uniform(images, count, source.device) if padding is None else Packing.of(padding)
                queries = Packing.uniform(images, len(query_position), source.device)
                if padding is not None:
                    source, position = (tokens.pack(x).view(x.shape) for x in (source, position))
                encoder_mask, self_mask, cross_mask = map(
                    AttentionMask.of, (tokens, queries, queries), (tokens, queries, tokens)
                )
            for layer in self.encoder.layers:
                source = self._run(layer, source, position, encoder_mask)
        with profiler_range("decoder"):
            with_position = source + position
            state = source.new_zeros(source.shape[0], *query_position.shape)
            states = []
            for layer in self.decoder.layers:
                state = self._run(layer, state, query_position, source, with_position, self_mask, cross_mask)
                states.append(self.decoder.norm(state))
            return torch.stack(states)

    def _run(self, layer: nn.Module, *inputs: Tensor | AttentionMask) -> Tensor:
        if self.checkpoint_activations and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
