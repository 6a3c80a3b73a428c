"""Depthwise convolution, of each channel by itself, whose weight gradient is taken in strips of three columns.

    y[b, c, u, v] = sum over i, j of x[b, c, s u + i - p, s v + j - p] * w[c, i, j] + bias[c]
    dw[c, i, j]   = sum over b, u, v of dy[b, c, u, v] * x[b, c, s u + i - p, s v + j - p]

oneDNN has a kernel for dw that takes at most three columns; a wider one is left to that of grouped convolutions, which
computes blocks of 16 x 16 channels to keep their diagonal. Columns j to j + n of dw are the weight gradient of a
convolution n columns wide whose image is moved by j: a 5x5 is one strip of three columns and one of two. Of strided
ones in bfloat16 it has no kernel for the input's gradient either, which is computed in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.convolution.geometry import as_under_autocast, channels_last
from detr_kernels.convolution.library import why_not_onednn_here
from detr_kernels.registry import Backend, Facts, Operation

WIDEST_STRIP = 3
"""Columns of the widest kernel that oneDNN's weight gradient of depthwise convolutions takes."""


def is_slow(columns: int, stride: int) -> bool:
    """Tell whether a gradient of such a convolution is one that the library is slow at, in some dtype."""
    return columns > WIDEST_STRIP or stride > 1


OPERATION = Operation(
    "depthwise_convolution",
    (
        Backend("strips", why_not_onednn_here, reason="oneDNN takes weight gradients of up to three columns"),
        Backend("ref"),
    ),
    mode="training",
)
"""Both run the same forward pass; they differ in the gradients of wide kernels, and of strided ones in bfloat16."""


def depthwise_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """Compute `depthwise_conv` in plain torch."""
    return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], mask: list[bool]
) -> tuple[Tensor, ...]:
    geometry = [stride] * 2, list(padding), [1, 1], False, [0, 0], x.shape[1]
    return torch.ops.aten.convolution_backward(dy, x, weight, [x.shape[1]], *geometry, mask)


class _InStrips(torch.autograd.Function):
    """The library's convolution and input gradient; the weight gradient strip by strip, the bias's with the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding
        return depthwise_conv_ref(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.geometry
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dy = channels_last(dy)
        dx = dweight = dbias = None
        if wants_x:
            wide = torch.float32 if stride > 1 else x.dtype
            operands = dy.to(wide), x.to(wide), weight.to(wide)
            dx = _gradients(*operands, stride, (padding, padding), [True, False, False])[0].to(x.dtype)
        if wants_weight:
            strips, last = [], (dy.shape[3] - 1) * stride - padding  # first column under the last place of the kernel
            for first in range(0, weight.shape[3], WIDEST_STRIP):
                columns = weight[..., first : first + WIDEST_STRIP]
                seen = F.pad(x, (padding - first, last + first + columns.shape[3] - x.shape[3]))
                mask = [False, True, wants_bias and first == 0]
                _, strip, bias = _gradients(dy, seen, columns, stride, (padding, 0), mask)
                strips.append(strip)
                dbias = bias if mask[2] else dbias
            dweight = torch.cat(strips, 3)
        elif wants_bias:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias, None, None


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, backend: str = "auto"
) -> Tensor:
    """Compute `F.conv2d(x, weight, bias, stride, padding, groups=C)` with one output a channel.

    x (B, C, H, W), weight (C, 1, h, w), bias (C,) or None; the result is (B, C, H', W'). Under autocast it computes in
    autocast's dtype. Raises ValueError for shapes that do not fit and RuntimeError where what is asked for cannot run.
    """
    channels = x.shape[1:2]
    if weight.ndim != 4 or weight.shape[:2] != (*channels, 1) or (bias is not None and bias.shape != channels):
        shapes = [tuple(each.shape) for each in (x, weight, bias) if each is not None]
        raise ValueError(f"x must be (B, C, H, W), weight (C, 1, h, w), bias (C,); got {shapes}")
    x, weight, bias = as_under_autocast(x, weight, bias)
    chosen = OPERATION.choose(Facts(x.device, x.dtype), backend).backend
    if chosen == "ref" or not is_slow(weight.shape[3], stride):
        return depthwise_conv_ref(x, weight, bias, stride, padding)
    return _InStrips.apply(channels_last(x), weight, bias, stride, padding)
