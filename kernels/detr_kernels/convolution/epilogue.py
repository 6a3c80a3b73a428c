"""Bias, residual and ReLU after a convolution, in one pass over memory instead of three.

    y = relu(conv + bias + residual)

The library computes the convolution of 3x3 and 7x7, without a bias; 1x1 has a kernel of its own (`pointwise.py`).
Backward:

    dz = dy (y > 0)    dbias = sum of dz over the pixels    dresidual = dz    dx, dweight: the library's, of dz

dz and dbias come from one pass, which reads dy and the saved output y.

The kernel writes y to memory of its own, not over the convolution's output: torch registers no gradient for an operator
that mutates. The convolution's output dies with it, so a captured graph or a compiler uses its memory again.
"""

from typing import Any

import torch
from torch import Tensor

from detr_kernels.convolution.geometry import channels_last, empty_image
from detr_kernels.launch import cdiv, launch, next_power_of_2
from detr_kernels.triton_compat import tl, triton

TILE = 4096
"""Entries that a program holds at a time: 32 a thread with 4 warps, in loads of 16 bytes."""
PARTIAL_SUMS = 256
"""Programs of the backward pass, and so rows of partial bias gradients: about two to every multiprocessor."""


@triton.jit(do_not_specialize=["pixels"])
def _forward_kernel(
    conv,  # (pixels, channels)
    bias,  # (channels,)
    residual,  # (pixels, channels), or None
    y,  # (pixels, channels)
    pixels,
    channels,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < pixels) & (channel < channels)
    at = pixel.to(tl.int64) * channels + channel
    total = tl.load(conv + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # keeps a NaN, as torch does
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def _backward_kernel(
    dy,  # (pixels, channels)
    y,  # (pixels, channels)
    dz,  # (pixels, channels)
    dbias,  # (programs, channels) float32, to be summed
    pixels,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    channel = tl.arange(0, CHANNELS)
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for first in range(program * PIXELS, pixels, tl.num_programs(0) * PIXELS):
        pixel = first + tl.arange(0, PIXELS)[:, None]
        inside = (pixel < pixels) & (channel[None, :] < channels)
        at = pixel.to(tl.int64) * channels + channel[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(tl.load(y + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, grad)
        sums += grad
        tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=inside)
    tl.store(dbias + program * channels + channel, tl.sum(sums, 0), mask=channel < channels)


def _blocks(channels: int) -> dict[str, int]:
    """Choose how many pixels of how many channels a program holds at a time."""
    width = next_power_of_2(channels)
    return {"PIXELS": max(1, TILE // width), "CHANNELS": width}


def _forward(conv: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Compute relu(conv + bias + residual), (B, N, H, W) with bias (N,)."""
    conv, bias = channels_last(conv), bias.contiguous()
    residual = None if residual is None else channels_last(residual)
    y = torch.empty_like(conv)
    channels = conv.shape[1]
    pixels, blocks = conv.numel() // channels, _blocks(channels)
    grid = (cdiv(pixels, blocks["PIXELS"]),)
    launch(_forward_kernel, grid, conv, bias, residual, y, pixels, channels, RELU=relu, **blocks, num_warps=4)
    return y


def _backward(dy: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute dz (B, N, H, W) and dbias (N,) float32 from dy and y (B, N, H, W)."""
    dy, y = channels_last(dy), channels_last(y)
    dz = torch.empty_like(dy)
    channels = dy.shape[1]
    pixels, blocks = dy.numel() // channels, _blocks(channels)
    programs = min(PARTIAL_SUMS, cdiv(pixels, blocks["PIXELS"]))
    dbias = torch.empty(programs, channels, dtype=torch.float32, device=dy.device)
    launch(_backward_kernel, (programs,), dy, y, dz, dbias, pixels, channels, **blocks, num_warps=8)
    return dz, dbias.sum(0)


forward_op = torch.library.custom_op("detr_kernels::bias_act", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::bias_act_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(conv, bias, residual, relu):
    return empty_image(conv, *conv.shape[1:])


@backward_op.register_fake
def _(dy, y):
    return empty_image(dy, *dy.shape[1:]), torch.empty(dy.shape[1], dtype=torch.float32, device=dy.device)


def _before_act(dy: Tensor, y: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Compute dz and, where it is wanted, dbias; `y` is None where there was no ReLU."""
    if y is None:
        return dy, dy.sum((0, 2, 3), dtype=torch.float32) if with_bias else None
    return backward_op(dy, y) if with_bias else (torch.ops.aten.threshold_backward(dy, y, 0), None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, _, relu = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(output if relu else None)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wants_conv, wants_bias, wants_residual, _ = ctx.needs_input_grad
    dz, dbias = _before_act(dy, ctx.saved_tensors[0], wants_bias)
    dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
    return dz if wants_conv else None, dbias, dz if wants_residual else None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)
