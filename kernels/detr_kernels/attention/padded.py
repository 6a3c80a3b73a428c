"""Attention of a batch whose images each have a row of tokens, padded to the longest.

    out = dropout(softmax(q k^T / sqrt(d))) v                 over the keys that are attended to

(Vaswani et al. 2017, section 3.2.)
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.attention.backends import OPERATION, ROWS
from detr_kernels.attention.blocked import blocked_attention
from detr_kernels.registry import Facts


def attention_ref(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Compute `padded_attention` in plain torch: in `nn.MultiheadAttention`'s order, its weights in memory."""
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    if attn_mask is None:
        return F.dropout(scores.softmax(-1), dropout) @ v
    some = attn_mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(attn_mask | ~some), float("-inf"))
    return torch.where(some, F.dropout(scores.softmax(-1), dropout) @ v, 0)


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute `F.scaled_dot_product_attention(q, k, v, attn_mask, dropout)` of q (B, H, Nq, d), k, v (B, H, Nk, d).

    Returns (B, H, Nq, d). `attn_mask` (B, 1, 1, Nk) bool is True where a key is attended to; None: everywhere. An image
    that attends to nothing gets zeros. Dropout, in training, is on the weights; blocked draws other numbers than torch
    from the same seed. Raises ValueError for a backend that takes packed tokens, RuntimeError where the one that is
    asked for cannot run.
    """
    p = dropout if training else 0.0
    facts = Facts(q.device, q.dtype, training, p, q.shape[-1])
    chosen = OPERATION.choose(facts, backend).backend
    if chosen not in ROWS:
        raise ValueError(f"attention by {chosen} takes packed tokens: see packed_attention. In rows: {', '.join(ROWS)}")
    if chosen == "ref":
        return attention_ref(q, k, v, attn_mask, p)
    if chosen == "blocked":
        return blocked_attention(q, k, v, attn_mask, p)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, p)
