"""Attention over packed tokens: each image's queries attend to that image's keys, and nothing is padded.

    out_i = sum_j dropout(w_ij) v_j        w_ij = softmax over j of q_i . k_j / sqrt(d)

with j over the keys of query i's own image (Vaswani et al. 2017, section 3.2). Queries and keys of all images lie one
after another, and `offsets` (B+1,) on the device says where each image begins. Rows after the last offset are a tail
that belongs to no image (`packing.py` says why there is one): zeros, with gradients of zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.attention_tiles import WIDTHS
from detr_kernels.dispatch import DTYPES, measurement, why_not_triton
from detr_kernels.packing import Blank, gather_rows, images_of_rows
from detr_kernels.triton_attention import triton_attention
from detr_kernels.xformers_attention import why_not_flash, xformers_attention

AttentionBackend = Literal["auto", "xformers", "sdpa", "triton", "ref"]
"""xformers: FlashAttention; sdpa: torch's own, padded; triton: our kernels; ref: plain torch; auto: what was measured
to be faster in a whole step on that GPU, else sdpa."""
AttentionForm = Literal["xformers", "sdpa", "triton", "ref"]
FIRST_GUESS = "fewest calls by the host; no other form was measured to be faster on this GPU"


@dataclass(frozen=True)
class _Places:
    """Where packed rows lie in a padded batch (B, longest), and back; all found on the device."""

    row: Tensor
    """(B*longest,) int64: the packed row that lies there, or 0."""
    filled: Tensor
    """(B, longest) bool: whether a row lies there."""
    place: Tensor
    """(rows,) int64: where the packed row lies, or 0."""
    placed: Tensor
    """(rows,) bool: whether it lies anywhere; the tail does not."""

    @classmethod
    def of(cls, offsets: Tensor, rows: int, longest: int) -> "_Places":
        starts, lengths = offsets[:-1, None].long(), offsets.diff()[:, None]
        step = torch.arange(longest, device=offsets.device)
        filled = step < lengths
        image = images_of_rows(offsets, rows)
        placed = image < len(starts)
        image = torch.where(placed, image, 0)
        place = image * longest + torch.arange(rows, device=offsets.device) - starts[image, 0]
        return cls(torch.where(filled, starts + step, 0).flatten(), filled, torch.where(placed, place, 0), placed)

    def pad(self, x: Tensor) -> Tensor:
        """(rows, H, d) -> (B, H, longest, d), with zeros where no row lies."""
        x = gather_rows(torch.where(self.placed[:, None, None], x, 0), self.row, self.place)
        x = torch.where(self.filled.flatten()[:, None, None], x, 0)
        return x.unflatten(0, self.filled.shape).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, H, longest, d) -> (rows, H, d), with zeros in the tail."""
        x = torch.where(self.filled[:, :, None, None], x.transpose(1, 2), 0).flatten(0, 1)
        return torch.where(self.placed[:, None, None], gather_rows(x, self.place, self.row), 0)

    def attended(self) -> Tensor:
        """(B, 1, 1, longest) bool, as SDPA's mask: an image without keys attends to the zeros in their places."""
        return (self.filled | ~self.filled.any(1, keepdim=True))[:, None, None, :]


def packed_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float = 0.0,
) -> Tensor:
    """The same in plain torch: padded, and with the weights in memory, in `nn.MultiheadAttention`'s order."""
    queries, keys = _Places.of(q_offsets, q.shape[0], longest_q), _Places.of(k_offsets, k.shape[0], longest_k)
    scores = (queries.pad(q) * math.sqrt(1.0 / q.shape[-1])) @ keys.pad(k).transpose(-2, -1)
    weights = scores.masked_fill(~keys.attended(), float("-inf")).softmax(-1)
    return queries.unpad(F.dropout(weights, dropout) @ keys.pad(v))


def packed_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float = 0.0,
) -> Tensor:
    """The same by `F.scaled_dot_product_attention`, padded for the call."""
    queries, keys = _Places.of(q_offsets, q.shape[0], longest_q), _Places.of(k_offsets, k.shape[0], longest_k)
    padded = queries.pad(q), keys.pad(k), keys.pad(v)
    return queries.unpad(F.scaled_dot_product_attention(*padded, attn_mask=keys.attended(), dropout_p=dropout))


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "xformers": xformers_attention,
    "sdpa": packed_attention_sdpa,
    "triton": triton_attention,
    "ref": packed_attention_ref,
}


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, training: bool, asked: AttentionBackend = "auto"
) -> tuple[AttentionForm, str]:
    """The implementation to run for heads of `head_dim` in `dtype` on `device`, and why.

    Raises RuntimeError where what is asked for by name cannot run, and ValueError for an unknown name.
    """
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"backend must be one of auto, {', '.join(IMPLEMENTATIONS)}, not {asked!r}")
    if asked == "sdpa" or asked == "ref":
        return asked, "asked for"
    if asked == "auto" and device.type == "cpu":
        return "sdpa", "the others need a GPU"
    if asked == "auto":
        chosen: tuple[AttentionForm, str] = measurement("packed_attention", device) or ("sdpa", FIRST_GUESS)
        problem = _why_not(chosen[0], device, dtype, head_dim, training)
        return ("sdpa", problem) if problem else chosen
    if problem := _why_not(asked, device, dtype, head_dim, training):
        raise RuntimeError(f"attention by {asked}: {problem}. Or ask for backend='sdpa'.")
    return asked, "asked for"


def _why_not(form: str, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
    if form == "triton":
        return why_not_triton(device) or _why_not_these_heads(dtype, head_dim)
    return why_not_flash(device, dtype, head_dim, training) if form == "xformers" else None


def _why_not_these_heads(dtype: torch.dtype, head_dim: int) -> str | None:
    if head_dim not in WIDTHS:
        return f"the kernels take heads of width {', '.join(map(str, WIDTHS))}, not {head_dim}"
    return None if dtype in DTYPES else f"the kernels do not compute in {str(dtype).removeprefix('torch.')}"


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    longest_q: int,
    longest_k: int,
    dropout: float = 0.0,
    training: bool = False,
    backend: AttentionBackend = "auto",
    blank: Blank | None = None,
) -> Tensor:
    """Softmax attention of every image's queries over its own keys: q (Mq, H, d), k, v (Mk, H, d) -> (Mq, H, d).

    `q_offsets`, `k_offsets` (B+1,) int32 on the tensors' device: rows offsets[b] to offsets[b+1] are image b's. No
    image has more than `longest_q` queries or `longest_k` keys; these are plain numbers, so that shapes are static.
    Rows of the tail and queries of an image without keys give zeros. `blank`: which rows these are, from
    `Packing.blank`; xformers would look for them in every call, the others need not be told. Dropout, in training, is
    on the weights; its mask depends on the backend. Raises ValueError for shapes, dtypes or numbers that do not fit and
    RuntimeError where a backend that is asked for by name cannot run.
    """
    _check(q, k, v, q_offsets, k_offsets, dropout)
    implementation, _ = choose_attention(q.device, q.dtype, q.shape[-1], training, backend)
    if 0 in (*q.shape, *k.shape, q_offsets.shape[0] - 1, longest_q, longest_k):  # nothing attends to anything
        return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0)
    p = dropout if training else 0.0
    if implementation == "xformers":
        return xformers_attention(q, k, v, q_offsets, k_offsets, longest_q, longest_k, p, blank)
    return IMPLEMENTATIONS[implementation](q, k, v, q_offsets, k_offsets, longest_q, longest_k, p)


def _check(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, dropout: float) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        shapes = [tuple(each.shape) for each in (q, k, v)]
        raise ValueError(f"q must be (Mq, H, d), k and v (Mk, H, d); got {shapes}")
    if q_offsets.dim() != 1 or q_offsets.shape != k_offsets.shape or len(q_offsets) == 0:
        raise ValueError(f"offsets must be (B+1,) both; got {[tuple(each.shape) for each in (q_offsets, k_offsets)]}")
    if not q.dtype == k.dtype == v.dtype or not q_offsets.dtype == k_offsets.dtype == torch.int32:
        dtypes = [each.dtype for each in (q, k, v, q_offsets, k_offsets)]
        raise ValueError(f"q, k and v must have one dtype and offsets int32; got {dtypes}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, not {dropout}")
