"""The backward pass of `triton_attention`: one kernel for the queries' gradient, then one for the keys' and values'.

    dv_j = sum_i m_ij w_ij dout_i      dw_ij = m_ij dout_i . v_j      ds_ij = w_ij (dw_ij - dout_i . out_i)
    dq_i = sum_j ds_ij k_j / sqrt(d)      dk_j = sum_i ds_ij q_i / sqrt(d)

with m_ij = 1 / (1 - p) for a kept weight and 0 for a dropped one (Dao 2023, section 3.1). The weights are recomputed
from the saved sums, and the mask is drawn again. Each kernel writes every entry of its outputs once: nothing is added
atomically, so the gradients do not depend on the order of programs. The factor 1 / (1 - p) waits for the last line.
"""

import torch
from torch import Tensor

from detr_kernels.attention.tiles import grid, image_rows, options, side_by_side, zero_padding_rows
from detr_kernels.dropout.philox import keep_mask_tile
from detr_kernels.launch import launch
from detr_kernels.triton_compat import gemm, tl, triton


@triton.jit(do_not_specialize=["rows"])
def _queries_backward_kernel(
    q,  # (Mq, H, d), rows q_step apart
    k,  # (Mk, H, d), rows k_step apart
    v,  # (Mk, H, d), rows v_step apart
    out,  # (Mq, H, d)
    dout,  # (Mq, H, d)
    lse,  # (H, Mq) float32
    cu_seqlens_q,  # (B+1,) int32
    cu_seqlens_k,  # (B+1,) int32
    seed,  # (1,) int64
    dq,  # (Mq, H, d)
    delta,  # (H, Mq) float32: dout_i . out_i (1 - P), which the keys' kernel reads
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
        zero_padding_rows(dq, first, rows, HEADS, WIDTH, BLOCK_Q)
        return
    start = tl.program_id(0) * BLOCK_Q
    if start >= queries:
        return
    first_key, keys = image_rows(cu_seqlens_k, image, 0)
    column = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    query = start + tl.arange(0, BLOCK_Q)
    row = (first + query).to(tl.int64)[:, None]
    there = query[:, None] < queries
    at = row * (HEADS * WIDTH) + column
    q_tile = tl.load(q + row * q_step + column, mask=there, other=0.0)
    dout_tile = tl.load(dout + at, mask=there, other=0.0)
    along = tl.sum(dout_tile.to(tl.float32) * tl.load(out + at, mask=there, other=0.0).to(tl.float32), 1) * (1 - P)
    in_sums = head * rows + first + query
    tl.store(delta + in_sums, along, mask=query < queries)
    log_sum = tl.load(lse + in_sums, mask=query < queries, other=0.0)
    k += first_key.to(tl.int64) * k_step
    v += first_key.to(tl.int64) * v_step
    dq_tile = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    if P > 0:
        stream = tl.load(seed) + image * HEADS + head
    for start_key in range(0, keys, BLOCK_K):
        key = start_key + tl.arange(0, BLOCK_K)
        k_tile = tl.load(k + key[:, None] * k_step + column, mask=key[:, None] < keys, other=0.0)
        v_tile = tl.load(v + key[:, None] * v_step + column, mask=key[:, None] < keys, other=0.0)
        scores = gemm(q_tile, tl.trans(k_tile), None, INTERPRETED) * BASE_2
        weights = tl.where(key[None, :] < keys, tl.exp2(scores - log_sum[:, None]), 0.0)
        dweights = gemm(dout_tile, tl.trans(v_tile), None, INTERPRETED)
        if P > 0:
            dweights = tl.where(keep_mask_tile(stream, start, start_key, P, BLOCK_Q, BLOCK_K), dweights, 0.0)
        dscores = weights * (dweights - along[:, None])
        dq_tile += gemm(dscores.to(k_tile.dtype), k_tile, None, INTERPRETED)
    tl.store(dq + at, (dq_tile * (SCALE / (1 - P))).to(dq.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["q_rows", "k_rows"])
def _keys_backward_kernel(
    q,  # (Mq, H, d), rows q_step apart
    k,  # (Mk, H, d), rows k_step apart
    v,  # (Mk, H, d), rows v_step apart
    dout,  # (Mq, H, d)
    lse,  # (H, Mq) float32
    delta,  # (H, Mq) float32
    cu_seqlens_q,  # (B+1,) int32
    cu_seqlens_k,  # (B+1,) int32
    seed,  # (1,) int64
    dk,  # (Mk, H, d)
    dv,  # (Mk, H, d)
    q_rows,
    k_rows,
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
    first, keys = image_rows(cu_seqlens_k, image, k_rows)
    if image + 1 == tl.num_programs(1):
        zero_padding_rows(dk, first, k_rows, HEADS, WIDTH, BLOCK_K)
        zero_padding_rows(dv, first, k_rows, HEADS, WIDTH, BLOCK_K)
        return
    start = tl.program_id(0) * BLOCK_K
    if start >= keys:
        return
    first_query, queries = image_rows(cu_seqlens_q, image, 0)
    column = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    key = start + tl.arange(0, BLOCK_K)[:, None]
    row = (first + key).to(tl.int64)
    k_tile = tl.load(k + row * k_step + column, mask=key < keys, other=0.0)
    v_tile = tl.load(v + row * v_step + column, mask=key < keys, other=0.0)
    q += first_query.to(tl.int64) * q_step
    dout += first_query.to(tl.int64) * (HEADS * WIDTH)
    lse += head * q_rows + first_query
    delta += head * q_rows + first_query
    dk_tile = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    dv_tile = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    if P > 0:
        stream = tl.load(seed) + image * HEADS + head
    for start_query in range(0, queries, BLOCK_Q):
        query = start_query + tl.arange(0, BLOCK_Q)
        q_tile = tl.load(q + query[:, None] * q_step + column, mask=query[:, None] < queries, other=0.0)
        dout_tile = tl.load(dout + query[:, None] * (HEADS * WIDTH) + column, mask=query[:, None] < queries, other=0.0)
        log_sum = tl.load(lse + query, mask=query < queries, other=0.0)
        along = tl.load(delta + query, mask=query < queries, other=0.0)
        weights = tl.exp2(gemm(q_tile, tl.trans(k_tile), None, INTERPRETED) * BASE_2 - log_sum[:, None])
        dweights = gemm(dout_tile, tl.trans(v_tile), None, INTERPRETED)
        dropped = weights
        if P > 0:
            keep = keep_mask_tile(stream, start_query, start, P, BLOCK_Q, BLOCK_K)
            dropped = tl.where(keep, weights, 0.0)
            dweights = tl.where(keep, dweights, 0.0)
        dv_tile += gemm(tl.trans(dropped.to(dout_tile.dtype)), dout_tile, None, INTERPRETED)
        dscores = weights * (dweights - along[:, None])
        dk_tile += gemm(tl.trans(dscores.to(q_tile.dtype)), q_tile, None, INTERPRETED)
    at = row * (HEADS * WIDTH) + column
    tl.store(dk + at, (dk_tile * (SCALE / (1 - P))).to(dk.dtype.element_ty), mask=key < keys)
    tl.store(dv + at, (dv_tile / (1 - P)).to(dv.dtype.element_ty), mask=key < keys)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor,
    max_seqlen: list[int],
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q (Mq, H, d), k and v (Mk, H, d), zeros in rows of padding."""
    q, k, v = (side_by_side(each) for each in (q, k, v))
    dout = dout.contiguous()
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (q, k, v))
    delta = torch.empty_like(lse)
    settings = options(q, p)
    cu_seqlens, steps = (cu_seqlens_q, cu_seqlens_k), (q.stride(0), k.stride(0), v.stride(0))
    programs = grid(cu_seqlens_q, max_seqlen[0], settings["BLOCK_Q"], q.shape[1])
    for_queries = (q, k, v, out, dout, lse, *cu_seqlens, seed, dq, delta, q.shape[0], *steps)
    launch(_queries_backward_kernel, programs, *for_queries, **settings)
    programs = grid(cu_seqlens_k, max_seqlen[1], settings["BLOCK_K"], q.shape[1])
    for_keys = (q, k, v, dout, lse, delta, *cu_seqlens, seed, dk, dv, q.shape[0], k.shape[0], *steps)
    launch(_keys_backward_kernel, programs, *for_keys, **settings)
    return dq, dk, dv


backward_op = torch.library.custom_op("detr_kernels::packed_attention_backward", _backward, mutates_args=())


@backward_op.register_fake
def _(dout, q, k, v, *rest):
    return tuple(each.new_empty(each.shape) for each in (q, k, v))
