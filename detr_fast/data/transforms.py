"""Augmentation and the evaluation resize, as DETR's (REFERENCE: Recipe), on uint8 images and boxes in pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

LONGEST_SIDE_BEFORE_CROP_PX = 16384
"""DETR does not bound the resize that precedes a crop; this does, for aspects past 27, so that memory lasts."""


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """Image uint8 (3, h, w), labels (T,) int64, boxes_xyxy_px (T, 4) float32."""

    image: Tensor
    labels: Tensor
    boxes_xyxy_px: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)"""
        return self.image.shape[1], self.image.shape[2]


Transform = Callable[[LabelledImage, np.random.Generator], LabelledImage]


@dataclass(frozen=True)
class EvaluationTransform:
    """Shorter side to `size`, longer side at most `max_size`, in pixels."""

    size: int
    max_size: int

    def __call__(self, item: LabelledImage, rng: np.random.Generator) -> LabelledImage:
        return resize(item, resized_size(item.size, self.size, self.max_size))


@dataclass(frozen=True)
class TrainTransform:
    """Flip in half of the images; then resize, in half of them after a random crop. All sizes in pixels."""

    sizes: Sequence[int]
    max_size: int
    crop_sizes: Sequence[int]
    """Shorter sides before the crop; empty: no crops."""
    crop_range: tuple[int, int]
    """Smallest and largest side of the crop."""

    def __call__(self, item: LabelledImage, rng: np.random.Generator) -> LabelledImage:
        if rng.random() < 0.5:
            item = flip(item)
        if self.crop_sizes and rng.random() >= 0.5:
            size = int(rng.choice(self.crop_sizes))
            item = resize(item, resized_size(item.size, size, LONGEST_SIDE_BEFORE_CROP_PX))
            item = crop(item, *random_region(item.size, self.crop_range, rng))
        return resize(item, resized_size(item.size, int(rng.choice(self.sizes)), self.max_size))


def resized_size(image_size: tuple[int, int], size: int, max_size: int) -> tuple[int, int]:
    """(h, w) with the shorter side `size`, or less so that the longer is about `max_size`; never 0.

    The roundings are DETR's: the longer side is cut to a whole number, and may so pass `max_size` by a little.
    """
    height, width = image_size
    shorter, longer = min(image_size), max(image_size)
    if longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
    if size == 0:
        return (1, max_size) if height < width else (max_size, 1)
    if shorter == size:
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


def resize(item: LabelledImage, size: tuple[int, int]) -> LabelledImage:
    """To `size` (h, w): bilinear with antialiasing."""
    if size == item.size:
        return item
    (height, width), (new_height, new_width) = item.size, size
    image = F.resize(item.image, list(size), F.InterpolationMode.BILINEAR, antialias=True)
    ratios = torch.tensor([new_width / width, new_height / height]).repeat(2)
    return LabelledImage(image, item.labels, item.boxes_xyxy_px * ratios)


def flip(item: LabelledImage) -> LabelledImage:
    """Left to right."""
    width = item.size[1]
    x0, y0, x1, y1 = item.boxes_xyxy_px.unbind(-1)
    return LabelledImage(item.image.flip(-1), item.labels, torch.stack((width - x1, y0, width - x0, y1), dim=-1))


def random_region(
    image_size: tuple[int, int], side_range: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a region with sides in `side_range`, or the image's where that is smaller."""
    smallest, largest = side_range
    width, height = (
        int(rng.integers(min(smallest, side), min(largest, side), endpoint=True)) for side in reversed(image_size)
    )
    top = int(rng.integers(image_size[0] - height, endpoint=True))
    left = int(rng.integers(image_size[1] - width, endpoint=True))
    return top, left, height, width


def crop(item: LabelledImage, top: int, left: int, height: int, width: int) -> LabelledImage:
    """The region, with boxes cut to it; those that have nothing left go."""
    image = item.image[:, top : top + height, left : left + width]
    corners = item.boxes_xyxy_px.reshape(-1, 2, 2) - torch.tensor([left, top])
    corners = torch.minimum(corners, torch.tensor([width, height], dtype=torch.float32)).clamp(min=0)
    keep = (corners[:, 1] > corners[:, 0]).all(dim=1)
    return LabelledImage(image, item.labels[keep], corners[keep].reshape(-1, 4))
