"""Images of a size that suits the backbone, and its feature maps of several strides as one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def joined(maps: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Join maps (B, C_i, h_i, w_i) of `strides` along their channels, at the size of the first (B, sum C_i, h, w).

    Coarser maps are repeated (their gradient is then a sum in fixed order, which bilinear weights have not on a GPU),
    finer ones averaged. Cells stay where they are in the image, whatever its size.
    """
    first, *others = maps
    height, width = first.shape[-2:]
    resampled = [first]
    for features, stride in zip(others, strides[1:], strict=True):
        if stride > strides[0]:
            resampled.append(F.interpolate(features, scale_factor=stride // strides[0])[..., :height, :width])
        else:
            resampled.append(F.avg_pool2d(features, strides[0] // stride, ceil_mode=True))
    return torch.cat(resampled, dim=1) if others else first


def divisible(images: Tensor, mask: Tensor | None, step: int) -> tuple[Tensor, Tensor | None]:
    """Pad images (B, 3, H, W), with zeros, and their mask (B, H, W), with True, to multiples of `step` pixels.

    None, the mask of images without padding, stays None where none is added.
    """
    height, width = images.shape[-2:]
    more = (0, -width % step, 0, -height % step)
    if not any(more):
        return images, mask
    if mask is None:
        mask = images.new_zeros((len(images), height, width), dtype=torch.bool)
    return F.pad(images, more), F.pad(mask, more, value=True)
