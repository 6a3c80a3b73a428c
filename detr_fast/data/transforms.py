"""Augmentation and the evaluation resize, as DETR's (Carion et al. 2020, section 4): crop box, size and flip.

Color jitter, which DETR has not, can be added.

An augmentation is sampled as numbers, before the image is read: so the sampler forms batches of like shape, the decoder
reads no more pixels than are needed, and the device resamples once. Many images' are sampled at once, in some passes
over arrays: training on many devices arranges hundreds of thousands.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr_fast.boxes import xyxy_to_cxcywh
from detr_fast.data.color_jitter import sampled_colors
from detr_fast.data.draws import NUMBERS_A_STREAM, Draws

LONGEST_SIDE_BEFORE_CROP_PX = 16384
"""DETR does not bound the resize that precedes a crop; this does, for aspects past 27, so that memory lasts."""


@dataclass(frozen=True)
class SampledAugmentation:
    """The crop, size, flip and colors of one image, in this order; in evaluation nothing is random."""

    crop_box: tuple[float, float, float, float]
    """Top, left, bottom, right in pixels of the image."""
    size: tuple[int, int]
    """(h, w) that the crop is resized to."""
    hflip: bool = False
    """Flipped horizontally."""
    color: tuple[float, ...] | None = None
    """Row by row the (3, 4) matrix that maps its levels; None: they stay."""

    def on_grid(self, draft_scale: int) -> tuple[int, int, int, int]:
        """Round the crop box to whole pixels of the image `draft_scale` times smaller; at least one each way.

        DETR crops a resized copy, whose pixels lie between the image's own: the box moves by half a pixel at most,
        and boxes are taken from where it really is.
        """
        top, left, bottom, right = (round(edge / draft_scale) for edge in self.crop_box)
        return top, left, max(bottom, top + 1), max(right, left + 1)

    def draft_scale(self) -> int:
        """Choose how many times smaller a JPEG is decoded, 1, 2, 4 or 8: at least `SPARE` times the final size."""
        top, left, bottom, right = self.crop_box
        spare = min((bottom - top) / self.size[0], (right - left) / self.size[1]) / SPARE
        return next(scale for scale in (8, 4, 2, 1) if scale <= max(spare, 1))


SPARE = 2
"""Like Pillow's reducing_gap: with twice the pixels wanted, the antialiased resize that follows decides the result."""


@dataclass(frozen=True, eq=False)
class SampledAugmentations:
    """The sampled augmentations of N images, as arrays."""

    crop_boxes: np.ndarray
    """(N, 4) float64"""
    sizes: np.ndarray
    """(N, 2) int64"""
    hflip: np.ndarray
    """(N,) bool"""
    colors: np.ndarray | None = None
    """(N, 3, 4) float64; None: levels stay as they are"""

    def __iter__(self) -> Iterator[SampledAugmentation]:
        count = len(self.hflip)
        colors = [None] * count if self.colors is None else self.colors.reshape(count, 12).tolist()
        arrays = (each.tolist() for each in (self.crop_boxes, self.sizes, self.hflip))
        for crop_box, size, hflip, color in zip(*arrays, colors, strict=True):
            yield SampledAugmentation(tuple(crop_box), tuple(size), hflip, color and tuple(color))


Transform = Callable[[np.ndarray, Draws], SampledAugmentations]
"""The (h, w) of N images, (N, 2) int64, to what is made of each; what is random is drawn from the second argument."""


@dataclass(frozen=True)
class EvaluationTransform:
    """Resizes the shorter side to `size`, the longer to at most `max_size`, in pixels."""

    size: int
    max_size: int

    def __call__(self, image_sizes: np.ndarray, draws: Draws | None = None) -> SampledAugmentations:
        sizes = resized_sizes(image_sizes, self.size, self.max_size)
        return SampledAugmentations(whole(image_sizes), sizes, np.zeros(len(sizes), dtype=bool))


HFLIP, CROP, CROP_SIZE, CROP_WIDTH, CROP_HEIGHT, CROP_LEFT, CROP_TOP, SIZE = range(NUMBERS_A_STREAM)
"""Which of an image's random numbers decides what."""


@dataclass(frozen=True)
class TrainTransform:
    """Flips half of the images; then resizes, half of them after a random crop. All sizes are in pixels."""

    sizes: Sequence[int]
    max_size: int
    crop_sizes: Sequence[int]
    """Shorter sides before the crop; empty: no crops."""
    crop_range: tuple[int, int]
    """Smallest and largest side of the crop."""
    color_jitter: float = 0.0
    """Strength from 0, colors as they are, to 1."""

    def __call__(self, image_sizes: np.ndarray, draws: Draws) -> SampledAugmentations:
        hflip = draws.fraction(HFLIP) < 0.5
        crop_boxes, seen = whole(image_sizes), image_sizes.copy()
        if self.crop_sizes:
            some = np.flatnonzero(draws.fraction(CROP) < 0.5)
            crop_boxes[some], seen[some] = self._cropped(image_sizes[some], draws[some], hflip[some])
        sizes = resized_sizes(seen, draws.choice(SIZE, self.sizes), self.max_size)
        colors = sampled_colors(self.color_jitter, draws) if self.color_jitter else None
        return SampledAugmentations(crop_boxes, sizes, hflip, colors)

    def _cropped(self, image_sizes: np.ndarray, draws: Draws, hflip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample crop boxes (N, 4) in pixels of the images, and their sizes (N, 2) in the resized images' pixels."""
        shorter = draws.choice(CROP_SIZE, self.crop_sizes)
        resized = resized_sizes(image_sizes, shorter, LONGEST_SIDE_BEFORE_CROP_PX)
        corner, size = random_crops(resized, self.crop_range, draws)
        # DETR crops what is flipped already
        corner[:, 1] = np.where(hflip, resized[:, 1] - corner[:, 1] - size[:, 1], corner[:, 1])
        scale = image_sizes / resized
        return np.hstack((corner * scale, (corner + size) * scale)), size


def whole(image_sizes: np.ndarray) -> np.ndarray:
    """Return the crop boxes (N, 4) that show all of images of (h, w), (N, 2)."""
    return np.hstack((np.zeros(image_sizes.shape), image_sizes))


def resized_sizes(image_sizes: np.ndarray, size: np.ndarray | int, max_size: int) -> np.ndarray:
    """Compute (h, w) (N, 2) int64 of images with the shorter side `size`, or less so that the longer fits `max_size`.

    `size` is one for all or (N,). No side is 0.

    The roundings are DETR's: the longer side is cut to a whole number, and may so pass `max_size` by a little.
    """
    shorter, longer = image_sizes.min(1), image_sizes.max(1)
    bounded = np.where(longer / shorter * size > max_size, np.rint(max_size * shorter / longer), size)
    new_longer = np.where(bounded == 0, max_size, np.floor(bounded * longer / shorter))
    new_shorter = np.maximum(bounded, 1)
    wide = image_sizes[:, 0] < image_sizes[:, 1]
    sides = np.where(wide, new_shorter, new_longer), np.where(wide, new_longer, new_shorter)
    return np.stack(sides, axis=1).astype(np.int64)


def random_crops(image_sizes: np.ndarray, side_range: tuple[int, int], draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Sample a crop of each image (N, 2): corners (top, left) and sizes (h, w), (N, 2) int64 each.

    Sides are in `side_range`, or the image's where that is smaller.
    """
    least, most = (np.minimum(side, image_sizes) for side in side_range)
    spare = most - least + 1
    size = least + np.stack((draws.below(CROP_HEIGHT, spare[:, 0]), draws.below(CROP_WIDTH, spare[:, 1])), axis=1)
    choices = image_sizes - size + 1
    corner = np.stack((draws.below(CROP_TOP, choices[:, 0]), draws.below(CROP_LEFT, choices[:, 1])), axis=1)
    return corner, size


def boxes_within(
    boxes_xyxy_px: Tensor,
    labels: Tensor,
    crop_box: tuple[float, float, float, float],
    hflip: bool,
    min_visible: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Clip boxes (T, 4) to `crop_box`; return them as cxcywh relative to it, flipped with it, and their labels (T,).

    A box of which nothing is left, or less than the fraction `min_visible` of its area, is dropped, with its label.
    """
    top, left, bottom, right = crop_box
    size = torch.tensor([right - left, bottom - top], dtype=torch.float32)
    whole = boxes_xyxy_px.reshape(-1, 2, 2) - torch.tensor([left, top], dtype=torch.float32)
    corners = torch.minimum(whole, size).clamp(min=0)
    before, after = ((each[:, 1] - each[:, 0]).prod(dim=1) for each in (whole, corners))
    keep = (corners[:, 1] > corners[:, 0]).all(dim=1) & (after >= min_visible * before)
    relative = (corners[keep] / size).reshape(-1, 4)
    if hflip:
        x0, y0, x1, y1 = relative.unbind(-1)
        relative = torch.stack((1 - x1, y0, 1 - x0, y1), dim=-1)
    return xyxy_to_cxcywh(relative), labels[keep]
