"""Multi-head attention: the one place where queries meet keys, with `nn.MultiheadAttention`'s parameters."""

import math
from typing import NamedTuple

import torch
from detr_kernels import AttentionBackend, Blank, Packing, attention_with_dropout, packed_attention
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.model.implementation import Implementation


class Packed(NamedTuple):
    """Where image b's queries and keys begin, counted over both dimensions, and which rows get zeros."""

    q_offsets: Tensor
    """(B + 1,) int32"""
    k_offsets: Tensor
    blank: Blank


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
        return cls(None, Packed(queries.offsets, keys.offsets, queries.blank(keys)))


UNPADDED = Layout()


def attention_ref(q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None, dropout: float) -> Tensor:
    """Plain attention (B, H, Nq, d), (B, H, Nk, d) -> (B, H, Nq, d); `attended` (B, 1, 1, Nk) bool, as SDPA's mask.

    The weights are materialised, in the order of operations of `nn.MultiheadAttention`. No key attended to: zeros.
    """
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if attended is None:
        return F.dropout(scores.softmax(-1), dropout) @ v
    some = attended.any(-1, keepdim=True)
    scores = scores.masked_fill(~(attended | ~some), float("-inf"))
    return torch.where(some, F.dropout(scores.softmax(-1), dropout) @ v, 0)


class MultiheadAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over `num_heads` heads (Vaswani et al. 2017, section 3.2), batch first."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.form: AttentionBackend = "sdpa"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def use(self, implementation: Implementation) -> None:
        self.form = implementation.attention

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
        if self.form in ("sdpa", "ref"):
            mixed = self._attend_in_rows(q, k, v, layout.padding)
        else:
            mixed = self._attend_packed(q, k, v, layout)
        return self.out_proj(mixed.flatten(2))

    def _attend_in_rows(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """(B, Nq, H, d), (B, Nk, H, d) -> (B, Nq, H, d), each image in its own row."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended = None if padding is None else ~padding[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        if self.form == "ref":
            mixed = attention_ref(q, k, v, attended, dropout)
        elif dropout and q.device.type == "cpu":
            mixed = attention_with_dropout(q, k, v, attended, dropout)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attended, dropout)
        return mixed.transpose(1, 2)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """The same of packed tokens."""
        if layout.padding is not None:
            raise ValueError(f"attention by {self.form} takes packed or unpadded tokens: see detr_kernels.Packing")
        if layout.packed is None:
            layout = Layout.of(*(Packing.uniform(x.shape[0], x.shape[1], x.device) for x in (q, k)))
        assert layout.packed is not None
        mixed = packed_attention(
            q.flatten(0, 1),
            k.flatten(0, 1),
            v.flatten(0, 1),
            layout.packed.q_offsets,
            layout.packed.k_offsets,
            longest_q=q.shape[1],
            longest_k=k.shape[1],
            dropout=self.dropout,
            training=self.training,
            backend=self.form,
            blank=layout.packed.blank,
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
