"""The one place that touches xformers: FlashAttention-2 (Dao 2023) on packed tokens, as its `BlockDiagonalMask` asks.

`memory_efficient_attention` with `op=(fmha.flash.FwOp, fmha.flash.BwOp)`, taken apart at the seam between its forward
and its backward pass. Each half is an operator of our own: torch.compile sees two opaque calls instead of xformers'
Python, and the state of dropout's generator goes from one to the other as a tensor. The mask carries the cu_seqlens
that already lie on the device and a fixed bound on the lengths, where `from_seqlens` would copy a list from the host.
So nothing here waits, and a captured graph serves every length. The kernels are torch's own: xformers' extension need
not load.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from detr_kernels.attention.packing import ZeroRows

DTYPES = (torch.bfloat16, torch.float16)
WIDEST_TRAINED, WIDEST = 192, 256
"""Widths of a head: wider ones than the first have no backward pass with dropout on most GPUs."""


@torch.compiler.assume_constant_result
def why_not_xformers() -> str | None:
    """Say why xformers cannot be used, in the words of what failed; None where it can."""
    return _failure()


@functools.cache
def _failure() -> str | None:
    try:
        with _quiet():
            from xformers.ops import fmha
    except (ImportError, OSError) as error:
        return f"xformers cannot be imported ({type(error).__name__}: {error})"
    return None if fmha.flash.FwOp.is_available() else "this xformers comes without FlashAttention"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence xformers' warning that its own extension, built for another CUDA, does not load.

    Its FlashAttention calls torch's kernels, and nothing here needs the rest.
    """
    log = logging.getLogger("xformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool) -> str | None:
    """Say why `xformers_attention` cannot run for such tensors; None where it can."""
    widest = WIDEST_TRAINED if training else WIDEST
    if device.type != "cuda":
        return f"xformers has no {device.type} path"
    if dtype not in DTYPES:
        return f"FlashAttention computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > widest:
        return f"FlashAttention takes heads whose width is a multiple of 8 up to {widest}, not {head_dim}"
    return _too_old(device) or why_not_xformers()


@torch.compiler.assume_constant_result
def _too_old(device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # a fake device
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"FlashAttention needs compute capability 8.0, this GPU has {major}.{minor}"


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
) -> Any:
    """Make what xformers' operators take: q, k, v with a batch dimension of one, and the mask.

    FlashAttention reads of the mask `seqstart` and `max_seqlen` alone; what would be known on the host stays empty.
    """
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    lengths = (
        _SeqLenInfo(seqstart=cu_seqlens, max_seqlen=max_seqlen, min_seqlen=0, seqstart_py=[])
        for cu_seqlens, max_seqlen in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k))
    )
    return fmha.Inputs(q[None], k[None], v[None], attn_bias=BlockDiagonalMask(*lengths), p=p)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute output (Mq, H, d) and log-sum-exp (H, Mq), undefined in padding, and the generator's state (2,) int64."""
    from xformers.ops import fmha

    inputs = _inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p)
    out, context = fmha.flash.FwOp.apply(inputs, needs_gradient=True)
    assert context is not None
    # xformers declares the state int64 and returns uint64
    state = torch.zeros(2, dtype=torch.int64, device=q.device) if p == 0 else context.rng_state.view(torch.int64)
    return out[0].contiguous(), context.lse[0].contiguous(), state


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v, undefined in rows of padding."""
    from xformers.ops import fmha

    inputs = _inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p)
    context = fmha.common.Context(lse=lse[None], out=out[None], rng_state=state.view(torch.uint64))
    gradients = fmha.flash.BwOp.apply(context, inputs, dout[None])
    return gradients.dq[0].contiguous(), gradients.dk[0].contiguous(), gradients.dv[0].contiguous()


def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    zero_q: Tensor | None = None,
    zero_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as `_forward`, with zeros in the zero_rows rows of the output. `zero_k` is for the backward pass."""
    out, lse, state = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p)
    _fill(out, zero_q)
    return out, lse, state


def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    zero_q: Tensor | None = None,
    zero_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do as `_backward`, with zeros in the zero_rows rows."""
    dq, dk, dv = _backward(dout, q, k, v, out, lse, state, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p)
    for gradient, zero_rows in ((dq, zero_q), (dk, zero_k), (dv, zero_k)):
        _fill(gradient, zero_rows)
    return dq, dk, dv


def _fill(x: Tensor, zero_rows: Tensor | None) -> None:
    if zero_rows is not None:
        x.masked_fill_(zero_rows[:, None, None], 0)


forward_op = torch.library.custom_op("detr_kernels::xformers_attention", _forward_op, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::xformers_attention_backward", _backward_op, mutates_args=())


@forward_op.register_fake
def _(q, k, v, *rest):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(2, dtype=torch.int64)


@backward_op.register_fake
def _(dout, q, k, v, *rest):
    return tuple(each.new_empty(each.shape) for each in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers, zero_q, zero_k = inputs
    ctx.save_for_backward(zero_q, zero_k, q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what is not differentiated would be memory written for nothing


def _autograd(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    zero_q, zero_k, *saved = ctx.saved_tensors
    gradients = backward_op(dout, *saved, *ctx.numbers, zero_q, zero_k)
    return *gradients, *[None] * 7


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def xformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p: float,
    zero_rows: ZeroRows | None = None,
) -> Tensor:
    """Compute `packed_attention` by xformers, with dropout of probability `p`.

    The caller asks `why_not_flash` first. FlashAttention leaves rows of padding undefined; here they are zeros, as are
    the rows of an image without keys, and so are their gradients. `zero_rows`: these rows, where they are known.
    """
    if zero_rows is None:
        zero_rows = ZeroRows.from_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0])
    out, *_ = forward_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p, *zero_rows)
    return out
