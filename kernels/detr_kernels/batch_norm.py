"""Frozen batch norm folded into the convolution before it: exact, and nothing is left to run.

    norm(y) = (y - mean) / sqrt(var + eps) * gamma + beta = y * scale + shift
    scale   = gamma / sqrt(var + eps),   shift = beta - mean * scale
    norm(conv(x, weight)) = conv(x, weight * scale) + shift

Plain torch, on purpose: the weights of a whole ResNet-50 are 23 million numbers against 3.3 GB of activations an image,
a few microseconds a layer, and a compiler makes one kernel of it. (Ioffe and Szegedy 2015, section 3.1, at inference.)
"""

import torch
from torch import Tensor


def fold_frozen_bn(
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weight (N, C, h, w) and bias (N,) of the convolution that is `norm(conv(x, weight))`; norm tensors are (N,).

    Every convolution that frozen batch norm follows becomes one with a bias. Both are float32, or the wider dtype that
    was given: rounded to bfloat16 only afterwards, by autocast. The norm is constant: a gradient goes to `weight`
    alone, and is the folded weight's times the scale. Raises ValueError for shapes that do not fit.
    """
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if any(each.shape != weight.shape[:1] for each in norm):
        shapes = [tuple(each.shape) for each in (weight, *norm)]
        raise ValueError(f"weight must be (N, C, h, w), and the norm's tensors (N,); got {shapes}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    gamma, beta, mean, var = (each.detach().to(dtype) for each in norm)
    scale = gamma * (var + eps).rsqrt()
    return weight.to(dtype) * scale[:, None, None, None], beta - mean * scale
