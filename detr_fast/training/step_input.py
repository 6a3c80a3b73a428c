"""A micro-batch as a training step takes it: tensors on the device, whose shapes a captured step keeps few."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from detr_fast.data.batch import Batch
from detr_fast.data.loader import model_input
from detr_fast.model.detr import DETR
from detr_fast.runtime import Runtime
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


@dataclass(frozen=True)
class OneShape:
    """What all micro-batches of one size in pixels have alike, so that they are replays of one CUDA graph."""

    targets: int = 16
    """Targets an image that there is room for at least."""
    masked: bool = False
    """They have a mask, which hides nothing where nothing is padded."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Makes it of a batch that has as many targets as any, and padding if any has."""
        return cls(batch.targets.with_room().labels.shape[1], batch.padded)


def step_input(batch: Batch, model: DETR, runtime: Runtime, shape: OneShape | None) -> StepInput:
    """Copies a batch to the device and makes its pixels there; of `shape` where there is one."""
    config, backend = model.config, model.backend("preprocessing")
    with stage("copy"):
        batch = batch.to(runtime.device)
    with stage("pixels"):
        images, mask = model_input(
            batch, config.image_mean, config.image_std, runtime.channels_last, runtime.dtype, backend
        )
    targets = batch.targets
    if shape is not None:
        targets = targets.with_room(shape.targets)
        if shape.masked and mask is None:
            mask = images.new_zeros((len(images), *batch.room), dtype=torch.bool)
    return StepInput(images, mask, targets.labels, targets.boxes_cxcywh, targets.count)
