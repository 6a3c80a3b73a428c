"""1x1 convolution with bias, residual and ReLU in one pass over memory, forward and backward.

    out[b, n, i, j] = relu(sum over c of weight[n, c] x[b, c, stride i, stride j] + bias[n] + residual[b, n, i, j])

In channels-last memory this is a GEMM, pixels (M, K = C) times weight (K, N), and a stride chooses rows. Two thirds of
a ResNet's layers are such (He et al. 2016, figure 5), once frozen batch norm is folded into weight and bias.
 Eager code makes up to three more passes over the outputs; here they are complete before they are first written.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.convolution.geometry import (
    as_under_autocast,
    channels_last,
    check_convolution,
    empty_image,
    output_shape,
)
from detr_kernels.convolution.pointwise_backward import input_gradient_op, weight_gradient_op
from detr_kernels.convolution.tiles import choose_blocks, launch_options, source_pixel, tile_of
from detr_kernels.launch import DTYPES, cdiv, launch
from detr_kernels.triton_compat import gemm, tl, triton


def conv1x1_bias_act_ref(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, stride: int = 1, relu: bool = True
) -> Tensor:
    """Compute `conv1x1_bias_act` in plain torch, which adds a bias in x's dtype."""
    out = F.conv2d(x, weight, bias.to(x.dtype), stride)
    out = out if residual is None else out + residual
    return out.relu() if relu else out


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _forward_kernel(
    x,  # (B, height, width, inputs)
    weight,  # (outputs, inputs)
    bias,  # (outputs,)
    residual,  # (pixels, outputs), or None
    out,  # (pixels, outputs)
    pixels,
    outputs,
    inputs,
    height,
    width,
    RELU: tl.constexpr,
    STRIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_row, tile_column = tile_of(pixels, outputs, PIXELS, OUTPUTS, GROUP)
    pixel = tile_row * PIXELS + tl.arange(0, PIXELS)[:, None]
    output = tile_column * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    x_row = x + source_pixel(pixel, height, width, STRIDE) * inputs
    # sums begin with the bias: added at the end, it takes a third more registers
    total = tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)
    total += tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        across = first + tl.arange(0, INPUTS)[None, :]
        down = first + tl.arange(0, INPUTS)[:, None]
        seen = tl.load(x_row + across, mask=(pixel < pixels) & (across < inputs), other=0.0)
        w = tl.load(weight + output * inputs + down, mask=(output < outputs) & (down < inputs), other=0.0)
        total = gemm(seen, w, total, INTERPRETED)
    inside = (pixel < pixels) & (output < outputs)
    at = pixel.to(tl.int64) * outputs + output
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # keeps a NaN, as torch does
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool) -> Tensor:
    """Compute out (B, N, H', W') from x (B, C, H, W), weight (N, C, 1, 1), bias (N,), residual (B, N, H', W')."""
    x, weight, bias = channels_last(x), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else channels_last(residual)
    out = empty_image(x, *output_shape(x, weight, stride)[1:])
    outputs, inputs = weight.shape[:2]
    pixels = out.numel() // outputs
    blocks = choose_blocks(pixels, outputs, inputs, x.dtype)
    grid = (cdiv(pixels, blocks.rows) * cdiv(outputs, blocks.columns),)
    arguments = (x, weight, bias, residual, out, pixels, outputs, inputs, *x.shape[2:])
    sizes = {"PIXELS": blocks.rows, "OUTPUTS": blocks.columns, "INPUTS": blocks.inner}
    launch(_forward_kernel, grid, *arguments, RELU=relu, STRIDE=stride, **sizes, **launch_options(blocks))
    return out


forward_op = torch.library.custom_op("detr_kernels::conv1x1_bias_act", _forward, mutates_args=())


@forward_op.register_fake
def _(x, weight, bias, residual, stride, relu):
    return empty_image(x, *output_shape(x, weight, stride)[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x only where the weight learns, the weight only where x does, and the output only for its ReLU."""
    x, weight, bias, _, ctx.stride, relu = inputs
    ctx.size, ctx.bias_dtype = x.shape[2:], bias.dtype
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, output if relu else None)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, out = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
    if out is not None and (wants_residual or (wants_bias and not wants_weight)):
        dy, out = torch.ops.aten.threshold_backward(dy, out, 0), None  # dz is wanted itself: mask once, and store it
    dx = input_gradient_op(dy, out, weight, *ctx.size, ctx.stride) if wants_x else None
    dweight = dbias = None
    if wants_weight:
        dweight, dbias = weight_gradient_op(dy, out, x, ctx.stride, wants_bias)
    elif wants_bias:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32)
    dbias = dbias.to(ctx.bias_dtype) if wants_bias and dbias is not None else None
    return dx, dweight, dbias, dy if wants_residual else None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def conv1x1_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    relu: bool = True,
) -> Tensor:
    """Compute `relu(F.conv2d(x, weight, bias, stride) + residual)` by one Triton kernel, for 1x1 at stride 1 or 2.

    `conv_bias_act` chooses when. x (B, C, H, W), weight (N, C, 1, 1), bias (N,), residual and result (B, N, H', W');
    residual and relu are optional. Under autocast it computes in autocast's dtype. It takes bfloat16, float16 and
    float32 (no TF32); reads channels-last images, copies others into that order, and returns it; adds the bias, which
    may be float32, to its float32 sums; and saves x only where the weight learns, the weight only where x does, the
    output only where there is a ReLU. Raises ValueError for shapes or dtypes that do not fit and RuntimeError where
    Triton cannot run.
    """
    x, weight, residual = as_under_autocast(x, weight, residual)
    check_convolution(x, weight, bias, residual, stride)
    if weight.shape[2:] != (1, 1) or stride not in (1, 2):
        raise ValueError(f"weight must be (N, C, 1, 1) and stride 1 or 2; got {tuple(weight.shape)} and {stride}")
    if x.dtype not in DTYPES:
        raise ValueError(f"the kernel computes in bfloat16, float16 or float32, not in {x.dtype}")
    return forward_op(x, weight, bias, residual, stride, relu)
