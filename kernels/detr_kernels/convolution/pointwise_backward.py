"""Gradients of a 1x1 convolution with bias and ReLU; the ReLU's mask is applied where dy is read.

    dz = dy (out > 0)    dx = dz weight    dweight = dz^T x    dbias = sum of dz over the pixels

`out` is the convolution's output, and None where it has no ReLU; then dz = dy. dz is not stored: both GEMMs read dy and
out. Pixels are rows (channels-last memory), sums are float32.
"""

import torch
from torch import Tensor

from detr_kernels.convolution.geometry import channels_last, empty_image
from detr_kernels.convolution.tiles import choose_blocks, launch_options, source_pixel, tile_of
from detr_kernels.launch import cdiv, launch
from detr_kernels.triton_compat import gemm, tl, triton


@triton.jit
def _masked(dy, out, at, inside):
    """Load dz at `at`, zero outside. At exactly 0 a ReLU's gradient is 0, and a NaN passes it on, as in torch."""
    dz = tl.load(dy + at, mask=inside, other=0.0)
    if out is not None:
        dz = tl.where(tl.load(out + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, dz)
    return dz


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _input_gradient_kernel(
    dy,  # (pixels, outputs)
    out,  # (pixels, outputs), or None
    weight,  # (outputs, inputs)
    dx,  # (B, height, width, inputs)
    pixels,
    outputs,
    inputs,
    height,
    width,
    STRIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_row, tile_column = tile_of(pixels, inputs, PIXELS, INPUTS, GROUP)
    pixel = tile_row * PIXELS + tl.arange(0, PIXELS)[:, None]
    column = tile_column * INPUTS + tl.arange(0, INPUTS)[None, :]
    row_start = pixel.to(tl.int64) * outputs
    total = tl.zeros((PIXELS, INPUTS), tl.float32)
    for first in range(0, outputs, OUTPUTS):
        across = first + tl.arange(0, OUTPUTS)[None, :]
        down = first + tl.arange(0, OUTPUTS)[:, None]
        dz = _masked(dy, out, row_start + across, (pixel < pixels) & (across < outputs))
        w = tl.load(weight + down * inputs + column, mask=(down < outputs) & (column < inputs), other=0.0)
        total = gemm(dz, w, total, INTERPRETED)
    at = source_pixel(pixel, height, width, STRIDE) * inputs + column
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(pixel < pixels) & (column < inputs))


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _weight_gradient_kernel(
    dy,  # (pixels, outputs)
    out,  # (pixels, outputs), or None
    x,  # (B, height, width, inputs)
    dweight,  # (splits, outputs, inputs) float32, to be summed
    dbias,  # (splits, outputs) float32, to be summed, or None
    pixels,
    outputs,
    inputs,
    height,
    width,
    STRIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    # x is the operand that is transposed: it goes from memory to the tensor cores as it is, dz through registers
    tile_row, tile_column = tile_of(inputs, outputs, INPUTS, OUTPUTS, GROUP)
    row = tile_row * INPUTS + tl.arange(0, INPUTS)
    column = tile_column * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    span = tl.cdiv(tl.cdiv(pixels, PIXELS), tl.num_programs(1)) * PIXELS
    total = tl.zeros((INPUTS, OUTPUTS), tl.float32)
    sums = tl.zeros((OUTPUTS,), tl.float32)
    for first in range(split * span, min((split + 1) * span, pixels), PIXELS):
        pixel = first + tl.arange(0, PIXELS)[:, None]
        at = pixel.to(tl.int64) * outputs + column[None, :]
        dz = _masked(dy, out, at, (pixel < pixels) & (column[None, :] < outputs))
        at = source_pixel(pixel, height, width, STRIDE) * inputs + row[None, :]
        seen = tl.load(x + at, mask=(pixel < pixels) & (row[None, :] < inputs), other=0.0)
        total = gemm(tl.trans(seen), dz, total, INTERPRETED)
        if dbias is not None:
            sums += tl.sum(dz.to(tl.float32), 0)
    at = (split * outputs + column[None, :]).to(tl.int64) * inputs + row[:, None]
    tl.store(dweight + at, total, mask=(row[:, None] < inputs) & (column[None, :] < outputs))
    if dbias is not None:
        tl.store(dbias + split * outputs + column, sums, mask=(column < outputs) & (tile_row == 0))


def _input_gradient(dy: Tensor, out: Tensor | None, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Compute dx (B, C, height, width) from dy and out (B, N, H', W') and weight (N, C, 1, 1)."""
    dy, weight = channels_last(dy), weight.contiguous()
    outputs, inputs = weight.shape[:2]
    pixels = dy.numel() // outputs
    dx = empty_image(dy, inputs, height, width)
    if stride > 1:
        dx.zero_()  # the pixels that no output saw
    blocks = choose_blocks(pixels, inputs, outputs, dy.dtype, masked=out is not None)
    grid = (cdiv(pixels, blocks.rows) * cdiv(inputs, blocks.columns),)
    arguments = (dy, out, weight, dx, pixels, outputs, inputs, height, width)
    sizes = {"PIXELS": blocks.rows, "INPUTS": blocks.columns, "OUTPUTS": blocks.inner}
    launch(_input_gradient_kernel, grid, *arguments, STRIDE=stride, **sizes, **launch_options(blocks))
    return dx


def _weight_gradient(dy: Tensor, out: Tensor | None, x: Tensor, stride: int, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Compute dweight (N, C, 1, 1) in x's dtype and dbias (N,) float32 from dy and out (B, N, H', W'), x (B, C, H, W).

    Without `with_bias` dbias is empty.
    """
    dy, x = channels_last(dy), channels_last(x)
    outputs, inputs = dy.shape[1], x.shape[1]
    pixels = dy.numel() // outputs
    blocks = choose_blocks(inputs, outputs, pixels, dy.dtype, masked=out is not None, split=True)
    dweight = torch.empty(blocks.splits, outputs, inputs, dtype=torch.float32, device=x.device)
    dbias = torch.empty(blocks.splits, outputs if with_bias else 0, dtype=torch.float32, device=x.device)
    grid = (cdiv(inputs, blocks.rows) * cdiv(outputs, blocks.columns), blocks.splits)
    arguments = (dy, out, x, dweight, dbias if with_bias else None, pixels, outputs, inputs, *x.shape[2:])
    sizes = {"INPUTS": blocks.rows, "OUTPUTS": blocks.columns, "PIXELS": blocks.inner}
    launch(_weight_gradient_kernel, grid, *arguments, STRIDE=stride, **sizes, **launch_options(blocks))
    return dweight.sum(0).to(x.dtype)[:, :, None, None], dbias.sum(0)


input_gradient_op = torch.library.custom_op("detr_kernels::conv1x1_input_gradient", _input_gradient, mutates_args=())
weight_gradient_op = torch.library.custom_op("detr_kernels::conv1x1_weight_gradient", _weight_gradient, mutates_args=())


@input_gradient_op.register_fake
def _(dy, out, weight, height, width, stride):
    return empty_image(dy, weight.shape[1], height, width)


@weight_gradient_op.register_fake
def _(dy, out, x, stride, with_bias):
    dbias = torch.empty(dy.shape[1] if with_bias else 0, dtype=torch.float32, device=x.device)
    return x.new_empty(dy.shape[1], x.shape[1], 1, 1), dbias
