"""Attention over packed tokens: each image's queries attend to that image's keys, and nothing is padded.

    out_i = sum_j dropout(w_ij) v_j        w_ij = softmax over j of q_i . k_j / sqrt(d)

with j over the keys of query i's own image (Vaswani et al. 2017, section 3.2). Queries and keys of all images lie one
after another, and `cu_seqlens` (B+1,) on the device says where each image begins. Rows from `cu_seqlens[-1]` on are
padding (`packing.py` says why there is some): they get zeros, and gradients of zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.attention.backends import OPERATION
from detr_kernels.attention.packing import ZeroRows, gather_rows, images_of_rows
from detr_kernels.attention.triton_forward import triton_attention
from detr_kernels.attention.xformers import xformers_attention
from detr_kernels.registry import Facts


@dataclass(frozen=True)
class _Rows:
    """Index packed rows in a padded batch (B, N), N = max_seqlen, and back; found on the device."""

    packed_index: Tensor
    """(B*N,) int64: the packed row of each token of the padded batch, or 0."""
    is_token: Tensor
    """(B, N) bool: False where the batch is padded."""
    padded_index: Tensor
    """(rows,) int64: the token of each packed row, counted over the padded batch, or 0."""
    in_image: Tensor
    """(rows,) bool: False for rows of padding."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> "_Rows":
        starts, lengths = cu_seqlens[:-1, None].long(), cu_seqlens.diff()[:, None]
        step = torch.arange(max_seqlen, device=cu_seqlens.device)
        is_token = step < lengths
        image = images_of_rows(cu_seqlens, rows)
        in_image = image < len(starts)
        image = torch.where(in_image, image, 0)
        padded_index = image * max_seqlen + torch.arange(rows, device=cu_seqlens.device) - starts[image, 0]
        packed_index = torch.where(is_token, starts + step, 0).flatten()
        return cls(packed_index, is_token, torch.where(in_image, padded_index, 0), in_image)

    def pad(self, x: Tensor) -> Tensor:
        """Pad (rows, H, d) to (B, H, N, d), with zeros where there is no token."""
        x = gather_rows(torch.where(self.in_image[:, None, None], x, 0), self.packed_index, self.padded_index)
        x = torch.where(self.is_token.flatten()[:, None, None], x, 0)
        return x.unflatten(0, self.is_token.shape).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """Unpad (B, H, N, d) to (rows, H, d), with zeros in rows of padding."""
        x = torch.where(self.is_token[:, :, None, None], x.transpose(1, 2), 0).flatten(0, 1)
        return torch.where(self.in_image[:, None, None], gather_rows(x, self.padded_index, self.packed_index), 0)

    def attn_mask(self) -> Tensor:
        """Make SDPA's mask (B, 1, 1, N) bool: an image without keys attends to the zeros that stand for them."""
        return (self.is_token | ~self.is_token.any(1, keepdim=True))[:, None, None, :]


def packed_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `packed_attention` in plain torch: padded, in `nn.MultiheadAttention`'s order, its weights in memory."""
    queries, keys = _Rows.of(cu_seqlens_q, q.shape[0], max_seqlen_q), _Rows.of(cu_seqlens_k, k.shape[0], max_seqlen_k)
    scores = (queries.pad(q) * math.sqrt(1.0 / q.shape[-1])) @ keys.pad(k).transpose(-2, -1)
    weights = scores.masked_fill(~keys.attn_mask(), float("-inf")).softmax(-1)
    return queries.unpad(F.dropout(weights, dropout) @ keys.pad(v))


def packed_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `packed_attention` by `F.scaled_dot_product_attention`, padded for the call."""
    queries, keys = _Rows.of(cu_seqlens_q, q.shape[0], max_seqlen_q), _Rows.of(cu_seqlens_k, k.shape[0], max_seqlen_k)
    padded = queries.pad(q), keys.pad(k), keys.pad(v)
    return queries.unpad(F.scaled_dot_product_attention(*padded, attn_mask=keys.attn_mask(), dropout_p=dropout))


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    zero_rows: ZeroRows | None = None,
) -> Tensor:
    """Compute softmax attention of every image's queries over its own keys: q (Mq, H, d), k and v (Mk, H, d).

    Returns (Mq, H, d). `cu_seqlens_q`, `cu_seqlens_k` (B+1,) int32 on the tensors' device: rows cu_seqlens[b] to
    cu_seqlens[b+1] are image b's. No image has more than `max_seqlen_q` queries or `max_seqlen_k` keys; these are plain
    numbers, so that shapes are static. Rows of padding and queries of an image without keys give zeros. `zero_rows`:
    which rows these are, from `Packing.zero_rows`; xformers would look for them in every call, the others need not be
    told. Dropout, in training, is on the weights; its mask depends on the backend. Raises ValueError for shapes, dtypes
    or numbers that do not fit and RuntimeError where a backend that is asked for by name cannot run.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout)
    chosen = OPERATION.choose(Facts(q.device, q.dtype, training, head_dim=q.shape[-1]), backend).backend
    if 0 in (*q.shape, *k.shape, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k):  # nothing is attended to
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0)
    arguments = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout if training else 0.0
    if chosen == "xformers":
        return xformers_attention(*arguments, zero_rows)
    if chosen == "triton":
        return triton_attention(*arguments)
    return packed_attention_sdpa(*arguments) if chosen == "sdpa" else packed_attention_ref(*arguments)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, dropout: float) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        shapes = [tuple(each.shape) for each in (q, k, v)]
        raise ValueError(f"q must be (Mq, H, d), k and v (Mk, H, d); got {shapes}")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or len(cu_seqlens_q) == 0:
        raise ValueError(
            f"cu_seqlens must be (B+1,) both; got {[tuple(each.shape) for each in (cu_seqlens_q, cu_seqlens_k)]}"
        )
    if not q.dtype == k.dtype == v.dtype or not cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32:
        dtypes = [each.dtype for each in (q, k, v, cu_seqlens_q, cu_seqlens_k)]
        raise ValueError(f"q, k and v must have one dtype and cu_seqlens int32; got {dtypes}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, not {dropout}")
