"""Multi-head attention: the one place where queries meet keys, with `nn.MultiheadAttention`'s parameters."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.implementation = "sdpa"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, Nq, D), (B, Nk, D), (B, Nk, D) -> (B, Nq, D).

        `key_padding_mask` (B, Nk) is True where a key is not to be attended to. An image whose keys are all masked
        gets zeros before the output projection, where `nn.MultiheadAttention` gives NaN.
        """
        if query is key:
            (wqk, wv), (bqk, bv) = self._split(2)
            q, k = F.linear(query, wqk, bqk).chunk(2, dim=-1)
        else:
            (wq, wkv), (bq, bkv) = self._split(1)
            (wk, wv), (bk, bv) = wkv.chunk(2), bkv.chunk(2)
            q, k = F.linear(query, wq, bq), F.linear(key, wk, bk)
        v = F.linear(value, wv, bv)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D/H)
        attended = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        attend = attention_ref if self.implementation == "ref" else F.scaled_dot_product_attention
        mixed = attend(q, k, v, attended, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def _split(self, parts: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The input projection's weight and bias, cut after `parts` of its three thirds."""
        dim = self.in_proj_weight.shape[1]
        sizes = [parts * dim, (3 - parts) * dim]
        return self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
