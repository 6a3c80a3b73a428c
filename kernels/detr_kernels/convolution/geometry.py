"""Shapes, dtypes and memory order of convolutions, as every backend here needs them."""

import torch
from torch import Tensor


def channels_last(images: Tensor) -> Tensor:
    """Return `images` (B, C, H, W) with a pixel's channels adjacent; a copy only where they are not."""
    return images.contiguous(memory_format=torch.channels_last)


def empty_image(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Allocate (B, channels, height, width), channels-last, with the batch size, dtype and device of `like`."""
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def output_shape(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> tuple[int, ...]:
    """Return (B, N, H', W'), the shape of the convolution of x (B, C, H, W) with weight (N, C, h, w)."""
    sides = zip(x.shape[2:], weight.shape[2:], strict=True)
    after = ((side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel in sides)
    return x.shape[0], weight.shape[0], *after


def as_under_autocast(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast all three to the dtype in which `F.conv2d` would compute: autocast's where it is on, except for float64."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x, weight, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if residual is None else residual.to(dtype)


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """Raise ValueError for shapes or dtypes that do not fit, and show them."""
    given = [each for each in (x, weight, bias, residual) if each is not None]
    fits = x.ndim == weight.ndim == 4 and x.shape[1] == weight.shape[1] and bias.shape == weight.shape[:1]
    if fits and residual is not None:
        fits = residual.shape == output_shape(x, weight, stride, padding, dilation)
    if not fits:
        shapes = [tuple(each.shape) for each in given]
        raise ValueError(
            f"x must be (B, C, H, W), weight (N, C, h, w), bias (N,), residual as the output; got {shapes}"
        )
    if weight.dtype != x.dtype or (residual is not None and residual.dtype != x.dtype):
        dtypes = [each.dtype for each in given]
        raise ValueError(f"x, weight and residual must have one dtype; got {dtypes}")
