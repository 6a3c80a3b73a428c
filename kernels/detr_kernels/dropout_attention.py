"""Attention with dropout on its weights, a few heads at a time: what training on a CPU runs.

    out = dropout(softmax(q k^T / sqrt(d))) v                 over the keys that are attended to

torch's `scaled_dot_product_attention` has one form with dropout on a CPU, the plain one, which computes in float32 and
keeps several tensors of B H Nq Nk numbers for the backward pass. Here so many heads are computed at a time that their
weights stay in the cache; what is kept of that size is dropout's mask alone, and the weights are computed again in the
backward pass. (Vaswani et al. 2017, section 3.2; Rabe and Staats 2021.)
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detr_kernels.cpu_dropout import keep_mask

CACHED_BYTES = 2**20
"""Weights of the heads that are computed together: with their gradients they stay in the second cache of a core."""


class _Heads:
    """The heads that are computed together, with room for two matrices of their weights' size."""

    def __init__(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> None:
        """q (G, Nq, d), already scaled, k (G, Nk, d); `hidden` (G, 1, Nk), True where a key is not attended to."""
        self.q, self.k, self.hidden = q, k, hidden
        self.together = max(1, CACHED_BYTES // (q.shape[1] * k.shape[1] * q.element_size()))
        self.room = q.new_empty(2, min(self.together, len(q)), q.shape[1], k.shape[1])

    def groups(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which heads, their softmax's weights (g, Nq, Nk), and room for as many numbers more."""
        for start in range(0, len(self.q), self.together):
            some = slice(start, start + self.together)
            scores, weights = self.room[:, : len(self.q[some])]
            torch.bmm(self.q[some], self.k[some].transpose(1, 2), out=scores)
            if self.hidden is not None:
                scores.masked_fill_(self.hidden[some], float("-inf"))
            yield some, torch.softmax(scores, -1, out=weights), scores


def _forward(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """q (G, Nq, d), k and v (G, Nk, d), hidden (G, 1, Nk) -> out (G, Nq, d), keep (G, Nq, Nk)."""
    q, k, v = q.contiguous() * math.sqrt(1 / q.shape[-1]), k.contiguous(), v.contiguous()
    out, keep = torch.empty_like(q), keep_mask((*q.shape[:2], k.shape[1]), p, q.dtype)
    for some, weights, _ in _Heads(q, k, hidden).groups():
        torch.bmm(weights.mul_(keep[some]), v[some], out=out[some])
    return out.mul_(1 / (1 - p)), keep


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, keep: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    scale = math.sqrt(1 / q.shape[-1])
    dout, q = dout * (1 / (1 - p)), q.contiguous() * scale
    k, v = k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for some, weights, room in _Heads(q, k, hidden).groups():
        torch.mul(weights, keep[some], out=room)
        torch.bmm(room.transpose(1, 2), dout[some], out=dv[some])
        torch.bmm(dout[some], v[some].transpose(1, 2), out=room).mul_(keep[some])
        torch._softmax_backward_data(room, weights, -1, weights.dtype, grad_input=room)
        torch.bmm(room, k[some], out=dq[some])
        torch.bmm(room.transpose(1, 2), q[some], out=dk[some])
    return dq.mul_(scale), dk, dv


forward_op = torch.library.custom_op("detr_kernels::dropout_attention", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::dropout_attention_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, hidden, p):
    keep = torch.empty(*q.shape[:2], k.shape[1], dtype=q.dtype, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), keep


@backward_op.register_fake
def _(dout, q, k, v, hidden, keep, p):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, hidden, ctx.p = inputs
    ctx.save_for_backward(q, k, v, hidden, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, hidden, keep = ctx.saved_tensors
    return *backward_op(dout, q, k, v, hidden, keep, ctx.p), None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None, p: float) -> Tensor:
    """`F.scaled_dot_product_attention(q, k, v, attended, p)` of q (B, H, Nq, d), k, v (B, H, Nk, d) -> (B, H, Nq, d).

    `attended` (B, 1, 1, Nk) bool or None: all are. An image that attends to nothing gets zeros. Dropout, with
    probability `p` of more than 0, draws from torch's generator, but other numbers than torch's own form.
    """
    images, heads, queries, width = q.shape
    hidden = some = None
    if attended is not None:
        some = attended.any(-1, keepdim=True)
        hidden = (~attended & some).expand(-1, heads, -1, -1).flatten(0, 1)
    flat = (x.reshape(images * heads, -1, width) for x in (q, k, v))
    out, _ = forward_op(*flat, hidden, p)
    out = out.view(images, heads, queries, width)
    return out if some is None else torch.where(some, out, 0)
