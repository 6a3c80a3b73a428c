"""Augmentation and the evaluation resize, as DETR's (REFERENCE: Recipe): which part of an image is seen, and how large.

A plan is numbers alone, drawn before the image is read: the sampler forms batches of like shape from it, the decoder
reads no more pixels than it needs, and the device resamples what is left in one pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr_fast.boxes import xyxy_to_cxcywh

LONGEST_SIDE_BEFORE_CROP_PX = 16384
"""DETR does not bound the resize that precedes a crop; this does, for aspects past 27, so that memory lasts."""


@dataclass(frozen=True)
class Plan:
    """What of an image is seen, and how large; drawn at once, mirrored last."""

    region: tuple[float, float, float, float]
    """Top, left, bottom, right in pixels of the image."""
    size: tuple[int, int]
    """(h, w) that the region gets."""
    mirrored: bool = False

    def on_grid(self, shrunk: int) -> tuple[int, int, int, int]:
        """The region in whole pixels of the image at one `shrunk`-th of its size; at least one each way.

        DETR crops a resized copy, whose pixels lie between the image's own: the region moves by half a pixel at most,
        and boxes are taken from where it really is.
        """
        top, left, bottom, right = (round(edge / shrunk) for edge in self.region)
        return top, left, max(bottom, top + 1), max(right, left + 1)

    def shrinkage(self) -> int:
        """The largest of 1, 2, 4, 8 by which a JPEG can be shrunk in decoding and still has `SPARE` times the pixels
        wanted, each way."""
        top, left, bottom, right = self.region
        spare = min((bottom - top) / self.size[0], (right - left) / self.size[1]) / SPARE
        return next(shrunk for shrunk in (8, 4, 2, 1) if shrunk <= max(spare, 1))


SPARE = 2
"""As Pillow's reducing_gap: with twice the pixels wanted, the antialiased resize that follows decides the result."""

Transform = Callable[[tuple[int, int], np.random.Generator], Plan]
"""(h, w) of an image to what is made of it."""


@dataclass(frozen=True)
class EvaluationTransform:
    """Shorter side to `size`, longer side at most `max_size`, in pixels."""

    size: int
    max_size: int

    def __call__(self, image_size: tuple[int, int], rng: np.random.Generator | None = None) -> Plan:
        return Plan((0, 0, *image_size), resized_size(image_size, self.size, self.max_size))


@dataclass(frozen=True)
class TrainTransform:
    """Flip in half of the images; then resize, in half of them after a random crop. All sizes in pixels."""

    sizes: Sequence[int]
    max_size: int
    crop_sizes: Sequence[int]
    """Shorter sides before the crop; empty: no crops."""
    crop_range: tuple[int, int]
    """Smallest and largest side of the crop."""

    def __call__(self, image_size: tuple[int, int], rng: np.random.Generator) -> Plan:
        mirrored = bool(rng.random() < 0.5)
        region: tuple[float, float, float, float] = (0, 0, *image_size)
        seen = image_size
        if self.crop_sizes and rng.random() >= 0.5:
            resized = resized_size(image_size, choice(self.crop_sizes, rng), LONGEST_SIDE_BEFORE_CROP_PX)
            top, left, height, width = random_region(resized, self.crop_range, rng)
            left = resized[1] - left - width if mirrored else left  # DETR crops what is mirrored already
            down, across = image_size[0] / resized[0], image_size[1] / resized[1]
            region = (top * down, left * across, (top + height) * down, (left + width) * across)
            seen = height, width
        return Plan(region, resized_size(seen, choice(self.sizes, rng), self.max_size), mirrored)


def choice(values: Sequence[int], rng: np.random.Generator) -> int:
    """One of them; five times as fast as the generator's own choice, which makes an array first."""
    return values[int(rng.integers(len(values)))]


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


def boxes_within(
    boxes_xyxy_px: Tensor, labels: Tensor, region: tuple[float, float, float, float], mirrored: bool
) -> tuple[Tensor, Tensor]:
    """Boxes (T, 4) and labels (T,) of what `region` shows, as cxcywh relative to it, mirrored where it is.

    Boxes are cut to the region, and those that have nothing left go with their labels.
    """
    top, left, bottom, right = region
    size = torch.tensor([right - left, bottom - top], dtype=torch.float32)
    corners = boxes_xyxy_px.reshape(-1, 2, 2) - torch.tensor([left, top], dtype=torch.float32)
    corners = torch.minimum(corners, size).clamp(min=0)
    keep = (corners[:, 1] > corners[:, 0]).all(dim=1)
    relative = (corners[keep] / size).reshape(-1, 4)
    if mirrored:
        x0, y0, x1, y1 = relative.unbind(-1)
        relative = torch.stack((1 - x1, y0, 1 - x0, y1), dim=-1)
    return xyxy_to_cxcywh(relative), labels[keep]
