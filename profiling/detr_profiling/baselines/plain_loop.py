"""Batches, training step and inference as facebookresearch's own scripts do them: what the baselines are run with.

Only the pixels come another way. In those scripts data workers resize and normalise on the host, and what is copied is
float32. Here a baseline gets the photographs as ours does, uint8 from pinned memory and one batch ahead, and resizes
and normalises them on the device by plain torch, within the timed step: ours would otherwise be timed with work that
theirs leaves to others.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from detr_fast.config import ModelConfig
from detr_fast.data.batch import Batch
from detr_fast.postprocess import postprocess
from detr_fast.preprocessing import Preprocessing
from detr_profiling.batches import copied_ahead
from detr_profiling.reference.criterion import Scores
from detr_profiling.workload import WorkloadOptions

BoxTargets = list[dict[str, Tensor]]
"""For each image `labels` (T,) int64 and `boxes` (T, 4) cxcywh."""


def box_targets(batch: Batch, dtype: torch.dtype = torch.float32) -> BoxTargets:
    """List those of a batch on the host, whose numbers of objects are read."""
    rows = zip(batch.targets.labels, batch.targets.boxes_cxcywh, batch.targets.count.tolist(), strict=True)
    return [{"labels": labels[:count], "boxes": boxes[:count].to(dtype)} for labels, boxes, count in rows]


@dataclass(frozen=True)
class PlainBatch:
    """A batch as the reference's model takes it: resized, normalised, in NCHW order, padding masked."""

    images: Tensor
    """(B, 3, H, W)"""
    mask: Tensor
    """(B, H, W), True where padded"""
    targets: BoxTargets
    original_sizes: Tensor
    """(B, 2)"""

    @classmethod
    def of(
        cls, batch: Batch, config: ModelConfig, dtype: torch.dtype = torch.float32, targets: BoxTargets | None = None
    ) -> Self:
        """Make it by plain torch where the batch lies; its `targets` lie anywhere, default: the batch's, which must
        then be on the host."""
        images, mask = Preprocessing(config.image_mean, config.image_std)(batch)
        if mask is None:
            mask = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool, device=images.device)
        targets = box_targets(batch, dtype) if targets is None else targets
        return cls(images.to(dtype), mask, targets, batch.original_sizes)

    def to(self, device: torch.device) -> Self:
        targets = [{name: value.to(device) for name, value in each.items()} for each in self.targets]
        return type(self)(self.images.to(device), self.mask.to(device), targets, self.original_sizes.to(device))


def plain_feed(
    batches: Sequence[Batch], config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Iterator[PlainBatch]:
    """Yield the batches over and over, copied one ahead as ours are; pixels are made on the device as one is taken."""
    targets = itertools.cycle([box_targets(batch, dtype) for batch in batches])
    for batch, wanted in zip(copied_ahead(batches, device), targets, strict=False):
        yield PlainBatch.of(batch, config, dtype, wanted).to(device)


def autocast(options: WorkloadOptions) -> torch.autocast:
    return torch.autocast(options.runtime.device, torch.bfloat16, enabled=options.runtime.precision == "bf16")


def training_step(model: nn.Module, loss: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """Make a step of forward, loss, backward, clip and AdamW in the recipe's two groups, which returns the loss."""
    model.train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if "backbone" not in name]},
        {"params": [p for name, p in named if "backbone" in name], "lr": 1e-5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)

    def step(batch: Any) -> Tensor:
        value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return value.detach()

    return step


def inference(
    model: nn.Module, forward: Callable[[PlainBatch], dict[str, Any]], scores: Scores = "softmax"
) -> Callable[[PlainBatch], Any]:
    """Make a step from a batch on the device to scores, labels and boxes in pixels there."""
    model.eval()

    @torch.no_grad()
    def step(batch: PlainBatch) -> Any:
        outputs = forward(batch)
        return postprocess(outputs["pred_logits"], outputs["pred_boxes"], batch.original_sizes, scores)

    return step
