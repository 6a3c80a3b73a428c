"""Dropout on a CPU: torch's own, with random numbers that cost a tenth.

    y = x keep / (1 - p)          keep = 1 where a number of 16 bits is at least p 65536, else 0

torch draws an entry's keep from a generator of 53 bits, one by one: 6 ns an entry, a fifth of DETR's training step on a
CPU. Here NumPy's PCG64 (O'Neill 2014) gives four entries with each word, from a seed that torch's generator draws.
p is met to 1/131072. (Srivastava et al. 2014; Triton's kernels draw their own, see `dropout.py`.)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DRAWN_WORDS = 2**18
"""Random words that are drawn at a time: few enough for the cache and for memory that is used again."""


def keep_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """1 with probability 1 - p, else 0, as `dtype` on the CPU; the seed is drawn from torch's generator there."""
    keep = torch.empty(shape, dtype=dtype)
    generator = np.random.Generator(np.random.PCG64(int(torch.randint(2**62, ()))))
    for part in keep.view(-1).split(4 * DRAWN_WORDS):
        words = generator.integers(0, 2**64, -(-len(part) // 4), dtype=np.uint64)
        torch.ge(torch.from_numpy(words.view(np.int16))[: len(part)], round(p * 65536) - 32768, out=part)
    return keep


def _forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    keep = keep_mask(x.shape, p, x.dtype)
    return (x * keep).mul_(1 / (1 - p)), keep


def _backward(dy: Tensor, keep: Tensor, p: float) -> Tensor:
    return (dy * keep).mul_(1 / (1 - p))


forward_op = torch.library.custom_op("detr_kernels::dropout", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::dropout_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(x, p):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


@backward_op.register_fake
def _(dy, keep, p):
    return torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.p = inputs[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return backward_op(dy, ctx.saved_tensors[0], ctx.p), None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def apply_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`F.dropout(x, p, training)` of the same shape; other numbers than torch's from the same seed on a CPU."""
    if x.device.type != "cpu" or not training or p == 0:
        return F.dropout(x, p, training)
    return forward_op(x, p)[0]
