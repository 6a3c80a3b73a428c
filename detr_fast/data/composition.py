"""Samples composed of several images: mosaic, mixup and copy-paste, as one mechanism.

A composed sample is a list of parts, painted one over the other on a canvas of the size that the sample has anyway: so
batches are arranged by shape as without. A part is a crop box of an image, scaled to a rectangle of the canvas; all are
sampled before anything is read. Mosaic (Bochkovskiy et al. 2020, YOLOv4) is four that meet in a point, mixup (Zhang et
al. 2018) one over all that is half transparent, copy-paste (Ghiasi et al. 2021, here without masks) some, each around
an object of another image.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detr_fast.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detr_fast.data.batch import Sample
from detr_fast.data.draws import NUMBERS_A_STREAM, Draws
from detr_fast.data.transforms import SampledAugmentation
from detr_fast.options import TrainOptions

MOSAIC, MIXUP, COPY_PASTE, CENTER_Y, CENTER_X, OPACITY, PATCHES = range(2 * NUMBERS_A_STREAM, 2 * NUMBERS_A_STREAM + 7)
"""Which of a sample's random numbers decides what; a part has a stream of its own, and all seven of it by name."""
FIRST_PART = 3 * NUMBERS_A_STREAM
TILES, MOST_PATCHES = 4, 3
MIXED, FIRST_PATCH = TILES, TILES + 1
"""Numbers of the parts that are no tiles."""


class LabelledImage(Protocol):
    """The facts about an image that are known before it is read."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def boxes_xyxy_px(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Part:
    """One image's part of a sample; of a sample that is not composed, all of it."""

    image: int
    """Its index in the data set."""
    augmentation: SampledAugmentation
    """Its crop box, the size of its rectangle of the canvas, and its flip."""
    corner: tuple[int, int] = (0, 0)
    """Top and left of the rectangle, in pixels."""
    opacity: float = 1.0
    """Below 1, what is beneath is seen through it."""

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """Return the rectangle, xyxy in pixels of the canvas."""
        (top, left), (height, width) = self.corner, self.augmentation.size
        return left, top, left + width, top + height


@dataclass(frozen=True)
class Composition:
    """Says which samples are composed: the fractions of them, and the epochs."""

    mosaic: float
    mixup: float
    copy_paste: float
    epochs: range

    @property
    def most_parts(self) -> int:
        """Bound the parts of a sample."""
        return (TILES if self.mosaic else 1) + (self.mixup > 0) + (MOST_PATCHES if self.copy_paste else 0)

    def parts(
        self, own: Part, draws: Draws, images: Sequence[LabelledImage], unreadable: Container[int] = ()
    ) -> list[Part]:
        """Sample the parts of a sample, in the order in which they are painted; `own` is all where it stays alone.

        `draws`: the sample's. The next of `images` takes the place of one that is `unreadable`.
        """
        sampler = PartSampler(own.augmentation.size, draws, images, unreadable)
        parts = [own]
        if sampler.fraction(MOSAIC) < self.mosaic:
            parts = sampler.tiles(own.image)
        if sampler.fraction(MIXUP) < self.mixup:
            parts.append(sampler.mixed())
        if sampler.fraction(COPY_PASTE) < self.copy_paste:
            parts += sampler.patches()
        return parts


@dataclass(frozen=True)
class PartSampler:
    """Samples the parts of one sample."""

    canvas: tuple[int, int]
    """(h, w)"""
    draws: Draws
    images: Sequence[LabelledImage]
    unreadable: Container[int]

    def fraction(self, number: int) -> float:
        return self.draws.fraction(number).item()

    def tiles(self, image: int) -> list[Part]:
        """Sample four parts that meet in a point of the canvas's middle half; the first is of the sample's `image`."""
        height, width = self.canvas
        y, x = (
            max(1, round(side * (0.25 + 0.5 * self.fraction(number))))
            for side, number in ((height, CENTER_Y), (width, CENTER_X))
        )
        rows, columns = ((0, y), (y, height - y)), ((0, x), (x, width - x))
        cells = enumerate(((top, left), (high, wide)) for top, high in rows for left, wide in columns)
        return [self._filled(tile, *cell, None if tile else image) for tile, cell in cells if all(cell[1])]

    def mixed(self) -> Part:
        """Sample a part over the whole canvas, with an opacity of 0.45 to 0.55 (Huang et al. 2025, DEIM)."""
        return replace(self._filled(MIXED, (0, 0), self.canvas), opacity=0.45 + 0.1 * self.fraction(OPACITY))

    def patches(self) -> list[Part]:
        """Sample up to three objects with some of what surrounds them; fewer where a drawn image has none."""
        last = FIRST_PATCH + int(MOST_PATCHES * self.fraction(PATCHES))
        return [patch for number in range(FIRST_PATCH, last + 1) if (patch := self._patch(number))]

    def _numbers(self, part: int) -> list[float]:
        """Draw a part's seven numbers: image, flip, scale, top, left, object, margin."""
        first = FIRST_PART + part * NUMBERS_A_STREAM
        return [self.fraction(number) for number in range(first, first + 7)]

    def _readable(self, fraction: float) -> int:
        """Return the image at `fraction` of all, or the next that can be read."""
        image = int(fraction * len(self.images))
        while image in self.unreadable:
            image = (image + 1) % len(self.images)
        return image

    def _sides(self, image: int) -> np.ndarray:
        return np.array([self.images[image].height, self.images[image].width])

    def _filled(self, part: int, corner: tuple[int, int], size: tuple[int, int], image: int | None = None) -> Part:
        """Sample a part that fills a rectangle; it shows, each way, half to all of what fits into the image.

        `image`: default, any.
        """
        drawn, hflip, scale, top, left, *_ = self._numbers(part)
        image = self._readable(drawn) if image is None else image
        sides = self._sides(image)
        shown = np.clip((sides / size).min() * (1 - scale / 2) * np.array(size), 1, sides)
        start = (sides - shown) * (top, left)
        return part_of(image, start, start + shown, size, hflip < 0.5, corner)

    def _patch(self, part: int) -> Part | None:
        """Sample an object with up to a quarter of its sides around it; half to one and a half times as large as it is
        in its image, and at most half the canvas each way. None where the image has no object."""
        drawn, hflip, scale, top, left, which, margin = self._numbers(part)
        image = self._readable(drawn)
        boxes, sides, canvas = self.images[image].boxes_xyxy_px, self._sides(image), np.array(self.canvas)
        if len(boxes) == 0:
            return None
        low, high = boxes[int(which * len(boxes))].astype(np.float64).reshape(2, 2)[:, ::-1]
        around = margin / 4 * (high - low)
        start = np.clip(low - around, 0, sides - 1)
        end = np.clip(high + around, start + 1, sides)
        factor = min((0.5 + scale) * canvas.min() / sides.min(), (canvas / 2 / (end - start)).min())
        size = np.maximum(np.rint(factor * (end - start)), 1).astype(int)
        corner = ((canvas - size + 1) * (top, left)).astype(int)
        return part_of(image, start, end, tuple(size.tolist()), hflip < 0.5, tuple(corner.tolist()))


def composition_of(options: TrainOptions) -> Composition | None:
    """Build what `options` ask for; None where nothing is to be composed."""
    asked, epochs = options.augmentation, options.optimizer.epochs
    if not asked.composes:
        return None
    begin, end = asked.compose_epochs or (epochs // 20, epochs - epochs // 5)
    return Composition(asked.mosaic, asked.mixup, asked.copy_paste, range(begin, end))


def part_of(
    image: int, start: np.ndarray, end: np.ndarray, size: tuple[int, int], hflip: bool, corner: tuple[int, int]
) -> Part:
    """Make a part of the crop box from `start` to `end`, (y, x) in pixels."""
    (top, left), (bottom, right) = start.tolist(), end.tolist()
    return Part(image, SampledAugmentation((top, left, bottom, right), size, hflip), corner)


def composed(parts: Sequence[Part], samples: Sequence[Sample], own: SampledAugmentation, min_visible: float) -> Sample:
    """Paint parts, each read as a sample, over one another into a sample; `own`: its augmentation, for size and colors.

    Boxes are of what is seen: one of which opaque parts leave nothing, or less than the fraction `min_visible`, goes.
    """
    height, width = own.size
    canvas = torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    boxes, labels = [], []
    for number, (part, sample) in enumerate(zip(parts, samples, strict=True)):
        left, top, right, bottom = part.rectangle
        beneath, pixels = canvas[:, top:bottom, left:right], scaled(sample)
        if part.opacity < 1:
            pixels = torch.lerp(beneath.float(), pixels.float(), part.opacity).round()
        beneath.copy_(pixels)
        covers = [later.rectangle for later in parts[number + 1 :] if later.opacity == 1]
        stretch, shift = np.array([right - left, bottom - top] * 2), np.array([left, top] * 2)
        corners = cxcywh_to_xyxy(sample.boxes_cxcywh).double().numpy() * stretch + shift
        for box, label in zip(corners, sample.labels.tolist(), strict=True):
            seen, fraction = uncovered(box, covers)
            if fraction > 0 and fraction >= min_visible:
                boxes.append(seen / ([width, height] * 2))
                labels.append(label)
    return replace(
        samples[0],
        image=canvas,
        labels=torch.tensor(labels, dtype=torch.int64),
        boxes_cxcywh=xyxy_to_cxcywh(torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4)),
        size=own.size,
        hflip=False,
        color=own.color,
    )


def scaled(sample: Sample) -> Tensor:
    """Resize and flip a sample's image as it is still to be: uint8 (3, h, w)."""
    pixels = F.resize(sample.image, list(sample.size), F.InterpolationMode.BILINEAR, antialias=True)
    return pixels.flip(-1) if sample.hflip else pixels


def uncovered(box: np.ndarray, covers: Sequence[tuple[float, ...]]) -> tuple[np.ndarray, float]:
    """Return the box (4,) of what rectangles, xyxy all, leave of a box, and what fraction of its area that is.

    Their edges cut it into cells, each of which is covered or not. What one leaves along a side of less than half a
    pixel cannot be seen, and counts as covered.
    """
    if not covers:
        return box, 1.0
    snapped = np.where(np.abs(np.subtract(covers, box)) < 0.5, box, covers)
    edges = np.vstack((box, snapped)).reshape(-1, 2, 2)  # (box or cover, low or high, x or y)
    x, y = (np.unique(edges[..., axis].clip(box[axis], box[axis + 2])) for axis in (0, 1))
    middles = np.stack(np.meshgrid((x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2), axis=-1)  # (rows, columns, x or y)
    low, high = edges[1:, 0, None, None], edges[1:, 1, None, None]  # (covers, 1, 1, x or y)
    covered = np.all((low < middles) & (middles < high), axis=-1)  # (covers, rows, columns)
    seen = ~np.any(covered, axis=0)
    if not seen.any():
        return box, 0.0
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    area = (seen * np.outer(np.diff(y), np.diff(x))).sum()
    left = np.array([x[columns[0]], y[rows[0]], x[columns[-1] + 1], y[rows[-1] + 1]])
    return left, area / (box[2:] - box[:2]).prod()
