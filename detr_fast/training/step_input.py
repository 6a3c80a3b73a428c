"""A micro-batch as a training step takes it: tensors on the device, whose shapes a graphed step keeps few."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from detr_fast.data.batch import Batch, Targets
from detr_fast.preprocessing import Preprocessing
from detr_fast.stages import stage


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
class OneShape:
    """Gives all micro-batches of one size in pixels the same shapes, so that they are replays of one CUDA graph."""

    targets: int = 16
    """Rows of targets an image, at least."""
    masked: bool = False
    """They have a mask, which hides nothing where nothing is padded."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Make it of a batch that has as many targets as any, and padding if any has."""
        return cls(batch.targets.pad_rows().labels.shape[1], batch.padded)


def step_input(batch: Batch, preprocessing: Preprocessing, shape: OneShape | None = None) -> StepInput:
    """Make a step's input of a batch on the device; of `shape` where there is one."""
    with stage("pixels"):
        images, mask = preprocessing(batch)
    targets = batch.targets
    if shape is not None:
        targets = targets.pad_rows(shape.targets)
        if shape.masked and mask is None:
            mask = images.new_zeros((len(images), *batch.padded_size), dtype=torch.bool)
    return StepInput(images, mask, targets.labels, targets.boxes_cxcywh, targets.count)
