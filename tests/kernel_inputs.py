"""Gives tests of kernels their device, tolerances, and random inputs that are the same each time."""

from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""dtype -> half a unit in its last place, or what two orders of summation may differ by, of the largest magnitude."""
TWO_DTYPES = (torch.float32, torch.bfloat16)
"""Those in which everything on a CPU computes."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def convolution_inputs(
    shape: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    residual: bool,
    dtype: torch.dtype,
    integers: bool = True,
) -> list[Any]:
    """Draw what `conv_bias_act` takes: x, weight, bias, residual or None, stride, padding, dilation.

    `shape`: images, inputs, height, width, outputs. Integers are -1, 0 and 1: all sums are exact in every dtype, many
    are 0, and so no rounding decides at which side of a ReLU a value lies, which would change its gradient wholly.
    """
    images, inputs, height, width, outputs = shape
    generator = seeded()

    def draw(*size: int) -> Tensor:
        if integers:
            return torch.randint(-1, 2, size, generator=generator).to(DEVICE, dtype)
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    x = draw(images, inputs, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = draw(outputs, inputs, kernel, kernel), draw(outputs)
    sides = [(side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side in (height, width)]
    after = draw(images, outputs, *sides).contiguous(memory_format=torch.channels_last) if residual else None
    return [x, weight, bias, after, stride, padding, dilation]


def in_dtype(inputs: list[Any], dtype: torch.dtype) -> list[Any]:
    """Return them with every tensor in `dtype`."""
    return [each.to(dtype) if isinstance(each, Tensor) else each for each in inputs]


def learning(inputs: list[Any]) -> list[Any]:
    """Return them with every tensor a leaf that wants a gradient."""
    return [each.detach().requires_grad_() if isinstance(each, Tensor) else each for each in inputs]
