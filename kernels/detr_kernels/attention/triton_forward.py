"""Attention over images of different lengths that lie one after another: no padding, no weights in memory.

    out_i = sum_j w_ij v_j        w_ij = exp(s_ij) / sum_j exp(s_ij)        s_ij = q_i . k_j / sqrt(d)

with j over the keys of query i's own image. The keys pass by in blocks, and the sums are scaled again whenever a larger
score turns up (Milakov and Gimelshein 2018; Dao et al. 2022). Powers are of two: the GPU has no other. At width 32 they
and dropout's random numbers are the limit, not the GEMMs.
"""

from typing import Any

import torch
from torch import Tensor

from detr_kernels.attention.tiles import grid, image_rows, options, side_by_side, zero_padding_rows
from detr_kernels.attention.triton_backward import backward_op
from detr_kernels.dropout.philox import draw_seed, keep_mask_tile
from detr_kernels.launch import launch
from detr_kernels.triton_compat import gemm, tl, triton


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    q,  # (Mq, H, d), rows q_step apart
    k,  # (Mk, H, d), rows k_step apart
    v,  # (Mk, H, d), rows v_step apart
    cu_seqlens_q,  # (B+1,) int32
    cu_seqlens_k,  # (B+1,) int32
    seed,  # (1,) int64
    out,  # (Mq, H, d)
    lse,  # (H, Mq) float32: log2 of sum_j exp(s_ij)
    rows,
    q_step,
    k_step,
    v_step,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BASE_2: tl.constexpr = SCALE * 1.4426950408889634  # log2(e)
    image, head = tl.program_id(1), tl.program_id(2)
    first, queries = image_rows(cu_seqlens_q, image, rows)
    if image + 1 == tl.num_programs(1):
        zero_padding_rows(out, first, rows, HEADS, WIDTH, BLOCK_Q)
        return
    start = tl.program_id(0) * BLOCK_Q
    if start >= queries:
        return
    first_key, keys = image_rows(cu_seqlens_k, image, 0)
    column = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    query = start + tl.arange(0, BLOCK_Q)
    row = (first + query).to(tl.int64)[:, None]
    there = query[:, None] < queries
    q_tile = tl.load(q + row * q_step + column, mask=there, other=0.0)
    k += first_key.to(tl.int64) * k_step
    v += first_key.to(tl.int64) * v_step
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    mixed = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    if P > 0:
        stream = tl.load(seed) + image * HEADS + head
    for start_key in range(0, keys, BLOCK_K):
        key = start_key + tl.arange(0, BLOCK_K)
        k_tile = tl.load(k + key[:, None] * k_step + column, mask=key[:, None] < keys, other=0.0)
        scores = tl.where(key[None, :] < keys, gemm(q_tile, tl.trans(k_tile), None, INTERPRETED), float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores * BASE_2 - (larger * BASE_2)[:, None])
        shrink = tl.exp2((largest - larger) * BASE_2)
        total = total * shrink + tl.sum(weights, 1)
        if P > 0:
            weights = tl.where(keep_mask_tile(stream, start, start_key, P, BLOCK_Q, BLOCK_K), weights, 0.0)
        v_tile = tl.load(v + key[:, None] * v_step + column, mask=key[:, None] < keys, other=0.0)
        mixed = mixed * shrink[:, None] + gemm(weights.to(v_tile.dtype), v_tile, None, INTERPRETED)
        largest = larger
    total = tl.where(keys > 0, total, 1.0)
    mixed /= total[:, None] * (1 - P)
    tl.store(out + row * (HEADS * WIDTH) + column, mixed.to(out.dtype.element_ty), mask=there)
    tl.store(lse + head * rows + first + query, largest * BASE_2 + tl.log2(total), mask=query < queries)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor,
    max_seqlen: list[int],
    p: float,
) -> tuple[Tensor, Tensor]:
    """Compute the output (Mq, H, d), zeros in rows of padding, and log2 of the sums (H, Mq), undefined there.

    `max_seqlen` bounds the lengths of an image's queries and keys.
    """
    q, k, v = (side_by_side(each) for each in (q, k, v))
    rows, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
    settings = options(q, p)
    programs = grid(cu_seqlens_q, max_seqlen[0], settings["BLOCK_Q"], heads)
    steps = q.stride(0), k.stride(0), v.stride(0)
    launch(_forward_kernel, programs, q, k, v, cu_seqlens_q, cu_seqlens_k, seed, out, lse, rows, *steps, **settings)
    return out, lse


forward_op = torch.library.custom_op("detr_kernels::packed_attention", _forward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen, p):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, ctx.max_seqlen, ctx.p = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what is not differentiated would be memory written for nothing


def _autograd(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(dout, *ctx.saved_tensors, ctx.max_seqlen, ctx.p), None, None, None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
) -> Tensor:
    """Compute `packed_attention` by our kernels, with dropout of probability `p`."""
    seed = draw_seed(q.device) if p > 0 else torch.empty(1, dtype=torch.int64, device=q.device)
    out, _ = forward_op(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, [max_seqlen_q, max_seqlen_k], p)
    return out
