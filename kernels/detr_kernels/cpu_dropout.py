"""Dropout on a CPU: torch's own, with random numbers that cost a tenth.

    y = x keep / (1 - p)          keep = 1 where a number of 16 bits is at least p 65536, else 0

torch draws an entry's keep from a generator of 53 bits, one by one: 6 ns an entry, a fifth of DETR's training step on a
CPU. Here NumPy's PCG64 (O'Neill 2014) gives four entries with each word, from a seed that torch's generator draws.
p is met to 1/131072. (Srivastava et al. 2014; Triton's kernels draw their own, see `dropout.py`.)
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAWN_WORDS = 2**18
"""Random words that are drawn at a time: few enough for the cache and for memory that is used again."""


class Keeper:
    """Draws which entries are kept, from a seed that torch's generator on the CPU gives."""

    def __init__(self, p: float) -> None:
        self.least = round(p * 65536) - 32768
        self.generator = np.random.Generator(np.random.PCG64(int(torch.randint(2**62, ()))))

    def fill(self, keep: Tensor) -> Tensor:
        """`keep`, which is contiguous, filled with 1 with probability 1 - p, else with 0."""
        for part in keep.view(-1).split(4 * DRAWN_WORDS):
            words = self.generator.integers(0, 2**64, -(-len(part) // 4), dtype=np.uint64)
            torch.ge(torch.from_numpy(words.view(np.int16))[: len(part)], self.least, out=part)
        return keep


def _forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    keep = Keeper(p).fill(torch.empty(x.shape, dtype=x.dtype))
    return (x * keep).mul_(1 / (1 - p)), keep


def _backward(dy: Tensor, keep: Tensor, p: float) -> Tensor:
    return (dy * keep).mul_(1 / (1 - p))


def _relu_forward(x: Tensor, p: float) -> Tensor:
    keep = Keeper(p).fill(torch.empty(x.shape, dtype=x.dtype))
    return torch.mul(x, keep, out=keep).clamp_min_(0).mul_(1 / (1 - p))


def _relu_backward(dy: Tensor, y: Tensor, p: float) -> Tensor:
    """y is above 0 where the ReLU and dropout both let x pass: nothing else need be kept."""
    return torch.ops.aten.threshold_backward(dy, y, 0).mul_(1 / (1 - p))


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)


forward_op = torch.library.custom_op("detr_kernels::dropout", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::dropout_backward", _backward, mutates_args=())
relu_op = torch.library.custom_op("detr_kernels::relu_dropout", _relu_forward, mutates_args=())
relu_backward_op = torch.library.custom_op("detr_kernels::relu_dropout_backward", _relu_backward, mutates_args=())

forward_op.register_fake(lambda x, p: (_like_first(x), _like_first(x)))
for op in (backward_op, relu_op, relu_backward_op):
    op.register_fake(_like_first)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return backward_op(dy, ctx.saved_tensors[0], ctx.p), None


def _relu_setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output)


def _relu_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return relu_backward_op(dy, ctx.saved_tensors[0], ctx.p), None


forward_op.register_autograd(_autograd, setup_context=_setup_context)
relu_op.register_autograd(_relu_autograd, setup_context=_relu_setup_context)


def apply_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout(x, p, training)` of the same shape; other numbers than torch's from the same seed on a CPU."""
    if x.device.type != "cpu" or not training or p == 0:
        return F.dropout(x, p, training)
    return forward_op(x, p)[0]


def relu_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout(F.relu(x), p, training)`, as `apply_dropout`; keeps nothing for the backward pass but the result."""
    if x.device.type != "cpu" or not training or p == 0:
        return F.dropout(F.relu(x), p, training)
    return relu_op(x, p)
