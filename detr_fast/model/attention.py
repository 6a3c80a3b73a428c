"""Multi-head attention: the one place where queries meet keys, with `nn.MultiheadAttention`'s parameters."""

from typing import NamedTuple

import torch
from detr_kernels import ROW_BACKENDS, Packing, ZeroRows, packed_attention, padded_attention
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.model.backends import Selectable


class Packed(NamedTuple):
    """Where image b's queries and keys begin, counted over both dimensions, and which rows get zeros."""

    cu_seqlens_q: Tensor
    """(B + 1,) int32"""
    cu_seqlens_k: Tensor
    zero_rows: ZeroRows


class Layout(NamedTuple):
    """Where the queries (B, Nq, D) and keys (B, Nk, D) of B images lie.

    Either image b has row b, and the keys where `padding` is True are not attended to; or all images' tokens lie one
    after another, and the rest belongs to no image.
    """

    padding: Tensor | None = None
    """(B, Nk) bool; None: no key is padding."""
    packed: Packed | None = None
    """None: each image has its row."""

    @classmethod
    def of(cls, queries: Packing, keys: Packing) -> "Layout":
        return cls(None, Packed(queries.cu_seqlens, keys.cu_seqlens, queries.zero_rows(keys)))


UNPADDED = Layout()


class MultiheadAttention(Selectable):
    """Computes softmax(q k^T / sqrt(d)) v over `num_heads` heads (Vaswani et al. 2017, section 3.2), batch first."""

    operations = ("attention",)

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout = UNPADDED) -> Tensor:
        """(B, Nq, D), (B, Nk, D), (B, Nk, D) -> (B, Nq, D); `layout` says where the tokens lie.

        An image whose keys are all padding gets zeros before the output projection, where `nn.MultiheadAttention` gives
        NaN. Packed forms take packed or unpadded tokens alone.
        """
        if query is key:
            (wqk, wv), (bqk, bv) = self._split(2)
            q, k = F.linear(query, wqk, bqk).chunk(2, dim=-1)
        else:
            (wq, wkv), (bq, bkv) = self._split(1)
            (wk, wv), (bk, bv) = wkv.chunk(2), bkv.chunk(2)
            q, k = F.linear(query, wq, bq), F.linear(key, wk, bk)
        v = F.linear(value, wv, bv)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))  # (B, N, H, D/H)
        backend = self.backend("attention")
        if backend in ("auto", *ROW_BACKENDS):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            attended = None if layout.padding is None else ~layout.padding[:, None, None, :]
            mixed = padded_attention(q, k, v, attended, self.dropout, self.training, backend).transpose(1, 2)
        else:
            mixed = self._attend_packed(q, k, v, layout, backend)
        return self.out_proj(mixed.flatten(2))

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str) -> Tensor:
        if layout.padding is not None:
            raise ValueError(f"attention by {backend} takes packed or unpadded tokens: see detr_kernels.Packing")
        if layout.packed is None:
            layout = Layout.of(*(Packing.uniform(x.shape[0], x.shape[1], x.device) for x in (q, k)))
        assert layout.packed is not None
        mixed = packed_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            layout.packed.cu_seqlens_q,
            layout.packed.cu_seqlens_k,
            max_seqlen_q=q.shape[1],
            max_seqlen_k=k.shape[1],
            dropout=self.dropout,
            training=self.training,
            backend=backend,
            zero_rows=layout.packed.zero_rows,
        )
        return mixed.view(q.shape)

    def _split(self, parts: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The input projection's weight and bias, cut after `parts` of its three thirds.

        Under autocast they are cast whole: each slice would be by itself, and in every call.
        """
        weight: Tensor = self.in_proj_weight
        bias: Tensor = self.in_proj_bias
        device = weight.device.type
        if device != "meta" and weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            weight, bias = (each.to(torch.get_autocast_dtype(device)) for each in (weight, bias))
        dim = weight.shape[1]
        sizes = [parts * dim, (3 - parts) * dim]
        return weight.split(sizes), bias.split(sizes)
