"""Dropout, and on a CPU its random numbers at a tenth of the cost.

    y = x / (1 - p) where a random number of 16 bits is above a threshold that p of all are not above, else 0

torch draws an entry's number from a generator of 53 bits, one by one: 6 ns an entry, a fifth of DETR's training step on
a CPU. Here NumPy's PCG64 (O'Neill 2014) gives four entries with each word, from a seed that torch's generator draws.
Their 16 bits are read as a bfloat16, whatever it is: so dropout is a ReLU's gradient, which torch computes in one pass
without a mask. p is met to 1/131072. (Srivastava et al. 2014; Triton's kernels draw their own, see `philox.py`.)
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.registry import Backend, Facts, Operation, zero_flop

DRAWN = 2**20
"""Numbers that are drawn at a time: few enough for the cache and for memory that is used again."""


@cache
def threshold_of(p: float) -> float:
    """Return the p-quantile of all bfloat16 bit patterns. A NaN is never dropped, so p is at most 0.996."""
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).float()
    ordered = numbers[~numbers.isnan()].sort().values
    return ordered[min(max(round(p * 2**16), 1), len(ordered)) - 1].item()


class Dropper:
    """Draws which entries are dropped, from a seed that torch's generator on the CPU gives."""

    def __init__(self, p: float) -> None:
        self.threshold = threshold_of(p)
        self.generator = np.random.Generator(np.random.PCG64(int(torch.randint(2**62, ()))))

    def numbers(self, count: int) -> Tensor:
        """Draw (count,) bfloat16 of random bits."""
        words = self.generator.integers(0, 2**64, -(-count // 4), dtype=np.uint64)
        return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)[:count]

    def drop(self, x: Tensor, out: Tensor) -> Tensor:
        """Write x, or 0 where it is dropped, unscaled to `out`; both are contiguous, and one may be the other."""
        for seen, left in zip(x.view(-1).split(DRAWN), out.view(-1).split(DRAWN), strict=True):
            threshold_backward.grad_input(seen, self.numbers(len(seen)), self.threshold, grad_input=left)
        return out


threshold_backward = torch.ops.aten.threshold_backward
"""(dy, x, threshold) -> dy where x is above, else 0."""


def _forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    numbers = Dropper(p).numbers(x.numel()).view(x.shape)
    return _backward(x, numbers, p), numbers


def _backward(dy: Tensor, numbers: Tensor, p: float) -> Tensor:
    return threshold_backward(dy, numbers, threshold_of(p)).mul_(1 / (1 - p))


def _relu_forward(x: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    return Dropper(p).drop(x, torch.empty_like(x)).clamp_min_(0).mul_(1 / (1 - p))


def _relu_backward(dy: Tensor, y: Tensor, p: float) -> Tensor:
    """Compute dx from y alone, which is above 0 where the ReLU and dropout both let x pass."""
    return threshold_backward(dy, y, 0).mul_(1 / (1 - p))


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty(first.shape, dtype=first.dtype, device=first.device)


forward_op = torch.library.custom_op("detr_kernels::dropout", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::dropout_backward", _backward, mutates_args=())
relu_op = torch.library.custom_op("detr_kernels::relu_dropout", _relu_forward, mutates_args=())
relu_backward_op = torch.library.custom_op("detr_kernels::relu_dropout_backward", _relu_backward, mutates_args=())

forward_op.register_fake(lambda x, p: (_like_first(x), _like_first(x).to(torch.bfloat16)))
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


def _why_not_pcg64(facts: Facts) -> str | None:
    return None if facts.device.type == "cpu" else f"NumPy draws on a CPU, not on {facts.device.type}"


OPERATION = Operation(
    "dropout",
    (
        Backend("pcg64", _why_not_pcg64, reason="NumPy's generator draws four entries with each word"),
        Backend("ref"),
    ),
    mode="training",
    flop=dict.fromkeys(("dropout", "dropout_backward", "relu_dropout", "relu_dropout_backward"), zero_flop),
)


def apply_dropout(x: Tensor, p: float, training: bool, backend: str = "auto") -> Tensor:
    """Compute `F.dropout(x, p, training)`; pcg64 draws other numbers than torch from the same seed.

    Raises RuntimeError where the backend that is asked for cannot run on x's device.
    """
    if not training or p == 0 or OPERATION.choose(Facts(x.device), backend).backend == "ref":
        return F.dropout(x, p, training)
    return forward_op(x, p)[0]


def relu_dropout(x: Tensor, p: float, training: bool, backend: str = "auto") -> Tensor:
    """Compute `F.dropout(F.relu(x), p, training)` as `apply_dropout`; pcg64 saves only the result for backward."""
    if not training or p == 0 or OPERATION.choose(Facts(x.device), backend).backend == "ref":
        return F.dropout(F.relu(x), p, training)
    return relu_op(x, p)
