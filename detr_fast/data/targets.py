"""Targets of a batch, padded to one static shape, so that everything on the device works without asking for sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING_BOX = 0.5
"""Each number of a box that stands for none: it has an area, so that no geometry on it divides by zero."""


@dataclass(frozen=True)
class Targets:
    """Labels (B, T) int64, boxes_cxcywh (B, T, 4) float32 in [0, 1], count (B,) int64; rows past an image's count are
    padding."""

    labels: Tensor
    boxes_cxcywh: Tensor
    count: Tensor

    @classmethod
    def from_list(cls, targets: Sequence[dict[str, Tensor]]) -> Self:
        """From one {"labels": (T,) int64, "boxes": (T, 4) cxcywh} an image."""
        device = targets[0]["labels"].device
        counts = [len(target["labels"]) for target in targets]
        labels = torch.zeros(len(targets), max(counts), dtype=torch.int64, device=device)
        boxes = torch.full((len(targets), max(counts), 4), PADDING_BOX, device=device)
        for row, (target, count) in enumerate(zip(targets, counts, strict=True)):
            labels[row, :count] = target["labels"]
            boxes[row, :count] = target["boxes"]
        return cls(labels, boxes, torch.tensor(counts, device=device))

    def with_room(self, least: int = 16) -> Self:
        """Padded to 16, 32, 64, ... rows an image, so that batches have few shapes."""
        rows = least
        while rows < self.labels.shape[1]:
            rows *= 2
        more = rows - self.labels.shape[1]
        boxes = F.pad(self.boxes_cxcywh, (0, 0, 0, more), value=PADDING_BOX)
        return type(self)(F.pad(self.labels, (0, more)), boxes, self.count)

    def __getitem__(self, some: slice) -> Self:
        """Those images' targets, padded as before."""
        return type(self)(self.labels[some], self.boxes_cxcywh[some], self.count[some])

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        parts = (self.labels, self.boxes_cxcywh, self.count)
        return type(self)(*(part.to(device, non_blocking=non_blocking) for part in parts))
