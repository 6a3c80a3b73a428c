"""Attention a few heads at a time: what a CPU runs in bfloat16, and in training with dropout on the weights.

    out = dropout(softmax(q k^T / sqrt(d))) v                 over the keys that are attended to

With dropout on a CPU, torch's `scaled_dot_product_attention` computes in float32 and saves five tensors of B H Nq Nk
numbers for the backward pass; without, its tiles of bfloat16 are so small that converting them takes longer than their
products. Here only so many heads are computed at a time that their weights stay in the cache, in the inputs' own
precision. For the backward pass the weights are saved, before and after dropout.
(Vaswani et al. 2017, section 3.2.)
"""

import math
from typing import Any

import torch
from torch import Tensor

from detr_kernels.dropout.pcg64 import Dropper

CACHED_BYTES = 2**23
"""Weights of the heads that are computed together: a matrix or two of them stays in the caches."""


def _groups(q: Tensor, k: Tensor) -> tuple[list[slice], int]:
    """Group heads of q (G, Nq, d) and k (G, Nk, d) to compute together; the second is how many those are."""
    together = max(1, min(len(q), CACHED_BYTES // max(1, q.shape[1] * k.shape[1] * q.element_size())))
    return [slice(start, start + together) for start in range(0, len(q), together)], together


def _weights(q: Tensor, k: Tensor, heads: int) -> Tensor:
    return q.new_empty(heads, q.shape[1], k.shape[1])


def _outputs(q: Tensor, k: Tensor, p: float, saves: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `_forward` returns."""
    weights, dropped = (_weights(q, k, len(q) if saved else 0) for saved in (saves, saves and p > 0))
    return q.new_empty(q.shape), weights, dropped


def _forward(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, p: float, saves: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out (G, Nq, d), and the weights (G, Nq, Nk) before and after dropout, of q (G, Nq, d), k, v (G, Nk, d).

    `attn_bias` (G, 1, Nk) is 0, or -inf where a key is not attended to. The weights are (0, Nq, Nk) where they are not
    saved, those after dropout also where there is none.
    """
    q, k, v = q.contiguous() * math.sqrt(1 / q.shape[-1]), k.contiguous(), v.contiguous()
    out, weights, dropped = _outputs(q, k, p, saves)
    groups, together = _groups(q, k)
    workspace, passing = _weights(q, k, together), _weights(q, k, 0 if saves else together)
    dropper = Dropper(p) if p else None
    for some in groups:
        scores = workspace[: len(q[some])]
        if attn_bias is None:
            torch.bmm(q[some], k[some].transpose(1, 2), out=scores)
        else:
            torch.baddbmm(attn_bias[some], q[some], k[some].transpose(1, 2), out=scores)
        mixing = torch.softmax(scores, -1, out=weights[some] if saves else passing[: len(scores)])
        if dropper is not None:
            mixing = dropper.drop(mixing, out=dropped[some] if saves else scores)
        torch.bmm(mixing, v[some], out=out[some])
    return out.mul_(1 / (1 - p)) if p else out, weights, dropped


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, dropped: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k and v; the scores' is dropped g - weights sum(dropped g), with g = dout v^T."""
    scale = math.sqrt(1 / q.shape[-1])
    dout, dropped = (dout * (1 / (1 - p)), dropped) if p else (dout.contiguous(), weights)
    q = q.contiguous() * scale
    k, v = k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups, together = _groups(q, k)
    workspace = _weights(q, k, together)
    for some in groups:
        dscores = workspace[: len(q[some])]
        torch.bmm(dropped[some].transpose(1, 2), dout[some], out=dv[some])
        torch.bmm(dout[some], v[some].transpose(1, 2), out=dscores).mul_(dropped[some])
        dscores.addcmul_(weights[some], dscores.sum(-1, keepdim=True), value=-1)
        torch.bmm(dscores, k[some], out=dq[some])
        torch.bmm(dscores.transpose(1, 2), q[some], out=dk[some])
    return dq.mul_(scale), dk, dv


forward_op = torch.library.custom_op("detr_kernels::blocked_attention", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::blocked_attention_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, attn_bias, p, saves=True):
    return _outputs(q, k, p, saves)


@backward_op.register_fake
def _(dout, q, k, v, weights, dropped, p):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, ctx.p, _ = inputs
    ctx.save_for_backward(q, k, v, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *backward_op(dout, *ctx.saved_tensors, ctx.p), None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, p: float) -> Tensor:
    """Compute `F.scaled_dot_product_attention(q, k, v, attn_mask, p)` of q (B, H, Nq, d) and k, v (B, H, Nk, d).

    Returns (B, H, Nq, d). `attn_mask` (B, 1, 1, Nk) bool is True where a key is attended to; None: everywhere. An image
    that attends to nothing gets zeros. Dropout, with probability `p` above 0, is seeded by torch's generator, but draws
    other numbers than torch's own.
    """
    images, heads, queries, width = q.shape
    attn_bias = some = None
    if attn_mask is not None:
        some = attn_mask.any(-1, keepdim=True)
        attn_bias = (
            q.new_zeros(()).masked_fill(~attn_mask & some, float("-inf")).expand(-1, heads, -1, -1).flatten(0, 1)
        )
    flat = (x.flatten(0, 1) for x in (q, k, v))
    saves = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, *_ = forward_op(*flat, attn_bias, p, saves)
    out = out.view(images, heads, queries, width)
    return out if some is None else torch.where(some, out, 0)
