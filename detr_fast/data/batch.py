"""Samples as they are read, their targets, and batches of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from detr_kernels import PackedImages
from detr_kernels.preprocessing.resize import Slot
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as it goes into a batch, before it is resized."""

    image: Tensor
    """uint8 (3, h, w)"""
    labels: Tensor
    """(T,) int64"""
    boxes_cxcywh: Tensor
    """(T, 4) float32, relative to the image, flipped where that is to be"""
    image_id: int
    original_size: tuple[int, int]
    """(h, w) of the file, before any transform"""
    size: tuple[int, int]
    """(h, w) that the image is to have in the batch"""
    hflip: bool = False
    """True: the image is still to be flipped horizontally"""
    color: tuple[float, ...] | None = None
    """Row by row the (3, 4) matrix that is still to map its levels; None: they stay"""


PADDING_BOX = 0.5
"""Each number of a box that stands for none: it has an area, so that no geometry on it divides by zero."""


@dataclass(frozen=True)
class Targets:
    """Labels and boxes of a batch, padded to T rows an image."""

    labels: Tensor
    """(B, T) int64"""
    boxes_cxcywh: Tensor
    """(B, T, 4) float32 in [0, 1]"""
    count: Tensor
    """(B,) int64: rows past an image's count are padding"""

    @classmethod
    def from_list(cls, targets: Sequence[dict[str, Tensor]]) -> Self:
        """Build from one {"labels": (T,) int64, "boxes": (T, 4) cxcywh} per image."""
        device = targets[0]["labels"].device
        counts = [len(target["labels"]) for target in targets]
        labels = torch.zeros(len(targets), max(counts), dtype=torch.int64, device=device)
        boxes = torch.full((len(targets), max(counts), 4), PADDING_BOX, device=device)
        for row, (target, count) in enumerate(zip(targets, counts, strict=True)):
            labels[row, :count] = target["labels"]
            boxes[row, :count] = target["boxes"]
        return cls(labels, boxes, torch.tensor(counts, device=device))

    def pad_rows(self, least: int = 16) -> Self:
        """Pad to 16, 32, 64, ... rows an image, so that batches have few shapes."""
        rows = least
        while rows < self.labels.shape[1]:
            rows *= 2
        more = rows - self.labels.shape[1]
        boxes = F.pad(self.boxes_cxcywh, (0, 0, 0, more), value=PADDING_BOX)
        return type(self)(F.pad(self.labels, (0, more)), boxes, self.count)

    def __getitem__(self, some: slice) -> Self:
        """Return some images' targets, padded as before."""
        return type(self)(self.labels[some], self.boxes_cxcywh[some], self.count[some])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        parts = (self.labels, self.boxes_cxcywh, self.count)
        return type(self)(*(part.to(device, non_blocking=non_blocking) for part in parts))


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step as they were read, with the sizes that `Preprocessing` gives them."""

    images: PackedImages
    padded_size: tuple[int, int]
    """(H, W) that all are padded to, right and below"""
    targets: Targets
    image_ids: list[int]
    original_sizes: Tensor
    """(B, 2) int64, (h, w) of the files"""
    skipped: tuple[str, ...] = ()
    """Paths of images that were to be read here and could not be, with --on-bad-image skip."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            original_sizes=self.original_sizes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, from which copies to a GPU do not block; the DataLoader calls it by this name."""
        targets = (self.targets.labels, self.targets.boxes_cxcywh, self.targets.count)
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=Targets(*(part.pin_memory() for part in targets)),
            original_sizes=self.original_sizes.pin_memory(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the pixels as the only tensor.

        Each tensor is a file in shared memory, for which the receiving process connects to the worker.
        """
        pixels, *small = self.tensors()
        values = [tensor.numpy() for tensor in small]
        return received_batch, (pixels, values, self.images.slots, self.padded_size, self.image_ids, self.skipped)

    def split(self, count: int) -> list["Batch"]:
        """Split into up to `count` micro-batches of like size, each padded as the whole."""
        size = -(-len(self.images) // count)
        slices = [slice(start, start + size) for start in range(0, len(self.images), size)]
        return [
            replace(
                self,
                images=self.images[some],
                targets=self.targets[some],
                image_ids=self.image_ids[some],
                original_sizes=self.original_sizes[some],
            )
            for some in slices
        ]

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that moves between devices."""
        targets = self.targets
        yield from (self.images.buffer, self.images.table, self.original_sizes)
        yield from (targets.labels, targets.boxes_cxcywh, targets.count)
        if self.images.colors is not None:
            yield self.images.colors

    @property
    def padded(self) -> bool:
        """Tell whether any image is smaller than the batch's padded size."""
        return any(size != self.padded_size for size in self.images.sizes)

    @property
    def padding_overhead(self) -> float:
        """Return the pixels of padding as a fraction of the images' own: 0 where nothing is padded."""
        computed = len(self.images) * self.padded_size[0] * self.padded_size[1]
        return computed / sum(h * w for h, w in self.images.sizes) - 1


def received_batch(
    pixels: Tensor,
    values: list[np.ndarray],
    slots: tuple[Slot, ...],
    padded_size: tuple[int, int],
    image_ids: list[int],
    skipped: tuple[str, ...],
) -> Batch:
    """Make a batch again from what `Batch.__reduce__` gives."""
    table, original_sizes, labels, boxes, count, *colors = map(torch.tensor, values)
    images, targets = PackedImages(pixels, table, slots, *colors), Targets(labels, boxes, count)
    return Batch(images, padded_size, targets, image_ids, original_sizes, skipped)


def collate(samples: Sequence[Sample], padded_size: tuple[int, int] = (1, 1)) -> Batch:
    """Make a batch of at least one sample, padded to the largest, and to `padded_size` at least."""
    images = PackedImages.from_list(
        [sample.image.permute(1, 2, 0) for sample in samples],
        [sample.size for sample in samples],
        [sample.hflip for sample in samples],
        [sample.color for sample in samples if sample.color] or None,
    )
    heights, widths = zip(padded_size, *images.sizes, strict=True)
    return Batch(
        images=images,
        padded_size=(max(heights), max(widths)),
        targets=Targets.from_list([{"labels": s.labels, "boxes": s.boxes_cxcywh} for s in samples]),
        image_ids=[sample.image_id for sample in samples],
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
    )
