"""The attention operation: its backends, where each can run, its floating-point operations and its specimens."""

import math
from typing import Any

import torch

from detr_kernels.attention import triton_backward, triton_forward
from detr_kernels.attention.tiles import WIDTHS
from detr_kernels.attention.xformers import why_not_flash
from detr_kernels.launch import DTYPES, unmeasured, why_not_triton
from detr_kernels.registry import Backend, Facts, Operation, Shape
from detr_kernels.specimens import DIM, HEADS, IMAGES, QUERIES, TOKENS, meta


def _why_not_blocked(facts: Facts) -> str | None:
    return None if facts.device.type == "cpu" else f"it is for a CPU's caches, not for {facts.device.type}"


def _blocked_only_by_name(facts: Facts) -> str | None:
    if facts.training and facts.dropout:
        return None
    if facts.dtype != torch.bfloat16:
        return "without dropout torch's own is as fast, but in bfloat16"
    return "nobody has measured it in bfloat16 with AMX" if torch.cpu._is_amx_tile_supported() else None


def _why_not_xformers(facts: Facts) -> str | None:
    return why_not_flash(facts.device, facts.dtype, facts.head_dim, facts.training)


def _why_not_triton(facts: Facts) -> str | None:
    if problem := why_not_triton(facts.device):
        return problem
    if facts.head_dim not in WIDTHS:
        return f"the kernels take heads of width {', '.join(map(str, WIDTHS))}, not {facts.head_dim}"
    if facts.dtype not in DTYPES:
        return f"the kernels do not compute in {str(facts.dtype).removeprefix('torch.')}"
    return None


def _packed_flop(q: Shape, cu_seqlens_q: Shape, max_seqlen_q: int, max_seqlen_k: int) -> int:
    """Count attention's two GEMMs of q (Mq, H, d), as if each of the B images had `max_seqlen` tokens.

    The true lengths are known on the device alone. So this is an upper bound: the number of a padded batch.
    """
    images, (_, heads, width) = cu_seqlens_q[0] - 1, q
    return 2 * (2 * images * heads * max_seqlen_q * max_seqlen_k * width)


def _triton_flop(q: Shape, *rest: Any, **_: Any) -> int:
    _k, _v, cu_seqlens_q, _cu_seqlens_k, _seed, max_seqlen, _p = rest
    return _packed_flop(q, cu_seqlens_q, *max_seqlen)


def _triton_backward_flop(dout: Shape, q: Shape, *rest: Any, **_: Any) -> int:
    _k, _v, _out, _lse, cu_seqlens_q, _cu_seqlens_k, _seed, max_seqlen, _p = rest
    return 2 * _packed_flop(q, cu_seqlens_q, *max_seqlen)


def _xformers_flop(q: Shape, *rest: Any, **_: Any) -> int:
    _k, _v, cu_seqlens_q, _cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_rest = rest
    return _packed_flop(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k)


def _xformers_backward_flop(dout: Shape, q: Shape, *rest: Any, **_: Any) -> int:
    _k, _v, _out, _lse, _state, cu_seqlens_q, _cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_rest = rest
    return 2 * _packed_flop(q, cu_seqlens_q, max_seqlen_q, max_seqlen_k)


def attention_flop(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Count both GEMMs of q (..., Nq, d) and k, v (..., Nk, d), with a leading dimension or two."""
    return 4 * math.prod(q) * k[-2]


def attention_backward_flop(dout: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Count two gradients for each GEMM; the scores, which are computed once more, are not counted."""
    return 2 * attention_flop(q, k, v)


def _specimens() -> None:
    """Launch the encoder's self-attention, queries and keys from one projection, and the decoder's cross-attention."""
    cu_seqlens, seed = meta(IMAGES + 1, dtype=torch.int32), meta(1, dtype=torch.int64)
    of_tokens, of_queries = (meta(IMAGES * count, HEADS, DIM // HEADS) for count in (TOKENS, QUERIES))
    halves = [half.unflatten(1, (HEADS, -1)) for half in meta(IMAGES * TOKENS, 2 * DIM).chunk(2, 1)]
    for q, k, max_seqlen in ((*halves, [TOKENS, TOKENS]), (of_queries, of_tokens, [QUERIES, TOKENS])):
        varlen = cu_seqlens, cu_seqlens, seed, max_seqlen
        out, lse = triton_forward._forward(q, k, of_tokens, *varlen, 0.1)
        triton_backward._backward(out, q, k, of_tokens, out, lse, *varlen, 0.1)


OPERATION = Operation(
    "attention",
    (
        Backend(
            "blocked",
            _why_not_blocked,
            _blocked_only_by_name,
            reason="torch's own is slow on a CPU in bfloat16, and with dropout",
        ),
        Backend("xformers", _why_not_xformers, unmeasured),
        Backend("triton", _why_not_triton, unmeasured),
        Backend("sdpa", reason="torch's own; another where it was measured to be faster"),
        Backend("ref"),
    ),
    flop={
        "blocked_attention": attention_flop,
        "blocked_attention_backward": attention_backward_flop,
        "packed_attention": _triton_flop,
        "packed_attention_backward": _triton_backward_flop,
        "xformers_attention": _xformers_flop,
        "xformers_attention_backward": _xformers_backward_flop,
    },
    specimens=_specimens,
)
ROWS = ("blocked", "sdpa", "ref")
"""Backends that keep each image's tokens in a row of its own; the others take them packed."""
