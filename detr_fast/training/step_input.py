"""Input of a training step: tensors on the device, of few shapes where the step is captured."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from detr_fast.data.batch import Batch, Targets
from detr_fast.preprocessing import Preprocessing
from detr_fast.profiler_ranges import profiler_range


class StepInput(NamedTuple):
    """One micro-batch on the device."""

    images: Tensor
    """(B, 3, H, W), normalised"""
    mask: Tensor | None
    """(B, H, W), True where padded; None: nothing is"""
    labels: Tensor
    """(B, T) int64"""
    boxes_cxcywh: Tensor
    """(B, T, 4)"""
    objects: Tensor
    """(B,) int64, how many of the T are an image's"""

    @property
    def targets(self) -> Targets:
        return Targets(self.labels, self.boxes_cxcywh, self.objects)


@dataclass(frozen=True)
class StaticShape:
    """Shape that all micro-batches of one size in pixels are given, so that they replay one CUDA graph."""

    targets: int = 16
    """Rows of targets an image, at least."""
    masked: bool = False
    """All have a mask, also where nothing is padded."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Take the shape of a batch that has as many targets as any, and padding if any has."""
        return cls(batch.targets.pad_rows().labels.shape[1], batch.padded)


def step_input(batch: Batch, preprocessing: Preprocessing, shape: StaticShape | None = None) -> StepInput:
    """Preprocess a batch on the device into a step's input; of `shape` where one is given."""
    with profiler_range("pixels"):
        images, mask = preprocessing(batch)
    targets = batch.targets
    if shape is not None:
        targets = targets.pad_rows(shape.targets)
        if shape.masked and mask is None:
            mask = images.new_zeros((len(images), *batch.padded_size), dtype=torch.bool)
    return StepInput(images, mask, targets.labels, targets.boxes_cxcywh, targets.count)
