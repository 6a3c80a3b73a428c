"""Multi-head attention with `nn.MultiheadAttention`'s parameters, over padded or packed tokens."""

from typing import NamedTuple

import torch
from detr_kernels import ROW_BACKENDS, Packing, ZeroRows, packed_attention, padded_attention
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.model.backends import Selectable


class Varlen(NamedTuple):
    """Metadata of packed (variable-length) tokens: where each image begins, and which rows get zeros."""

    cu_seqlens_q: Tensor
    """(B + 1,) int32"""
    cu_seqlens_k: Tensor
    zero_rows: ZeroRows


class AttentionMask(NamedTuple):
    """Says which keys (B, Nk, D) the queries (B, Nq, D) of each image attend to.

    Either image b has row b, and keys where `padding` is True are not attended to; or the tokens are packed: those of
    all images lie one after another, counted over both dimensions, and rows of padding come last.
    """

    padding: Tensor | None = None
    """(B, Nk) bool; None: no key is padding."""
    varlen: Varlen | None = None
    """Set where tokens are packed; None: each image has its row."""
    sets: int = 1
    """Equal parts of a row, one after another, each of which attends to itself as if it were an image."""

    @classmethod
    def of(cls, queries: Packing, keys: Packing, sets: int = 1) -> "AttentionMask":
        return cls(None, Varlen(queries.cu_seqlens, keys.cu_seqlens, queries.zero_rows(keys)), sets)


UNPADDED = AttentionMask()


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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask = UNPADDED) -> Tensor:
        """Attend: query (B, Nq, D), key and value (B, Nk, D) -> (B, Nq, D).

        An image whose keys are all padding gets zeros before the output projection, where `nn.MultiheadAttention` gives
        NaN. Raises ValueError where the backend takes packed tokens and `mask` has padding.
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
        if mask.sets > 1:
            q, k, v = (x.unflatten(1, (mask.sets, -1)).flatten(0, 1) for x in (q, k, v))  # (B * S, N / S, H, D/H)
        backend = self.backend("attention")
        if backend in ("auto", *ROW_BACKENDS):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            attn_mask = None if mask.padding is None else ~mask.padding[:, None, None, :]
            mixed = padded_attention(q, k, v, attn_mask, self.dropout, self.training, backend).transpose(1, 2)
        else:
            mixed = self._attend_varlen(q, k, v, mask, backend)
        mixed = mixed.flatten(2)
        return self.out_proj(mixed if mask.sets == 1 else mixed.reshape(query.shape))

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, backend: str) -> Tensor:
        if mask.padding is not None:
            raise ValueError(f"attention by {backend} takes packed or unpadded tokens: see detr_kernels.Packing")
        if mask.varlen is None:
            queries, keys = (Packing.uniform(x.shape[0], x.shape[1], x.device) for x in (q, k))
            mask = AttentionMask.of(queries, keys)
        assert mask.varlen is not None
        mixed = packed_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            mask.varlen.cu_seqlens_q,
            mask.varlen.cu_seqlens_k,
            max_seqlen_q=q.shape[1],
            max_seqlen_k=k.shape[1],
            dropout=self.dropout,
            training=self.training,
            backend=backend,
            zero_rows=mask.varlen.zero_rows,
        )
        return mixed.view(q.shape)

    def _split(self, thirds: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Split the input projection's weight and bias after `thirds` of its three thirds.

        Under autocast they are cast before: slices would be cast one by one, in every call.
        """
        weight: Tensor = self.in_proj_weight
        bias: Tensor = self.in_proj_bias
        device = weight.device.type
        if device != "meta" and weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            weight, bias = (each.to(torch.get_autocast_dtype(device)) for each in (weight, bias))
        dim = weight.shape[1]
        sizes = [thirds * dim, (3 - thirds) * dim]
        return weight.split(sizes), bias.split(sizes)
