"""Frozen batch norm folded into the convolution before it: exact, and nothing is left to run.

    norm(y) = (y - mean) / sqrt(var + eps) * gamma + beta = y * scale + shift
    scale   = gamma / sqrt(var + eps),   shift = beta - mean * scale
    norm(conv(x, weight)) = conv(x, weight * scale) + shift

Plain torch, on purpose: the weights of a whole ResNet-50 are 23 million numbers against 3.3 GB of activations an image,
a few microseconds a layer, and a compiler makes one kernel of it. (Ioffe and Szegedy 2015, section 3.1, at inference.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detr_kernels.registry import Backend, Facts, Operation


class _ScaledTogether(torch.autograd.Function):
    """Scale several weights in one launch or two, by scales of the weights' own shape and memory order."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scales: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*scales)
        return _rounded(torch._foreach_mul(list(weights), list(scales)), dtype)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        scales = ctx.saved_tensors
        return None, None, *torch._foreach_mul(_rounded(dys, scales[0].dtype), list(scales))


def _rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    if tensors[0].dtype == dtype:
        return tuple(tensors)
    rounded = [torch.empty_like(each, dtype=dtype) for each in tensors]
    torch._foreach_copy_(rounded, list(tensors))
    return tuple(rounded)


def frozen_bn_scale_and_shift(
    bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute scale and shift (N,) of norm(y) = y * scale + shift in `dtype`, without gradient."""
    gamma, beta, mean, var = (each.detach().to(dtype) for each in (bn_weight, bn_bias, running_mean, running_var))
    scale = gamma * (var + eps).rsqrt()
    return scale, beta - mean * scale


def _why_not_foreach(facts: Facts) -> str | None:
    if facts.device.type != "cuda":
        return f"it saves launches on a GPU, not on {facts.device.type}"
    return "torch.compile joins the launches itself" if facts.compiled else None


OPERATION = Operation(
    "frozen_batch_norm",
    (
        Backend("foreach", _why_not_foreach, reason="folds the norms of a whole stage in few launches"),
        Backend("folded", reason="folded into the convolution before it"),
        Backend("ref"),
    ),
)
"""foreach and folded make it part of the convolution before it; ref runs it by itself."""


def scale_weight(weight: Tensor, scale: Tensor, rounded_to: torch.dtype) -> Tensor:
    """Multiply each output's weight (N, C, h, w) by its scale (N,), in the wider of both dtypes, and round."""
    return (weight.to(scale.dtype) * scale[:, None, None, None]).to(rounded_to)


def scale_weights(weights: Sequence[Tensor], scales: Sequence[Tensor], rounded_to: torch.dtype) -> tuple[Tensor, ...]:
    """Scale several weights at once, on a GPU in few launches, by scales of their own shape, dtype and memory order."""
    return _ScaledTogether.apply(rounded_to, scales, *weights)


def fold_frozen_bn(
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Make weight (N, C, h, w) and bias (N,) of the convolution that is `norm(conv(x, weight))`; norm tensors are (N,).

    Every convolution that frozen batch norm follows becomes one with a bias. Both are float32, or the wider dtype that
    was given; the weight is rounded afterwards, and only if asked to be. The norm is constant: a gradient goes to
    `weight` alone, and is the folded weight's times the scale. Raises ValueError for shapes that do not fit.
    """
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if any(each.shape != weight.shape[:1] for each in norm):
        shapes = [tuple(each.shape) for each in (weight, *norm)]
        raise ValueError(f"weight must be (N, C, h, w), and the norm's tensors (N,); got {shapes}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale, shift = frozen_bn_scale_and_shift(*norm, eps, dtype)
    return scale_weight(weight, scale, rounded_to or dtype), shift
