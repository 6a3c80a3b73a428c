"""Batches, training step and inference as facebookresearch's own scripts do them: what our peers are run with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from detr_fast.config import ModelConfig
from detr_fast.data.batching import Batch, model_input
from detr_fast.evaluation.postprocess import postprocess
from detr_profiling.workload import WorkloadOptions

BoxTargets = list[dict[str, Tensor]]
"""For each image `labels` (T,) int64 and `boxes` (T, 4) cxcywh."""


@dataclass(frozen=True)
class PlainBatch:
    """As the reference's data pipeline leaves it on the host: normalised, in NCHW order, padding masked."""

    images: Tensor
    """(B, 3, H, W)"""
    mask: Tensor
    """(B, H, W), True where padded"""
    targets: BoxTargets
    original_sizes: Tensor
    """(B, 2)"""

    @classmethod
    def of(cls, batch: Batch, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Self:
        images, mask = model_input(batch, config.image_mean, config.image_std, channels_last=False)
        mask = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool) if mask is None else mask
        rows = zip(batch.targets.labels, batch.targets.boxes_cxcywh, batch.targets.count.tolist(), strict=True)
        targets = [{"labels": labels[:count], "boxes": boxes[:count].to(dtype)} for labels, boxes, count in rows]
        return cls(images.to(dtype), mask, targets, batch.original_sizes)

    def to(self, device: torch.device) -> Self:
        targets = [{name: value.to(device) for name, value in each.items()} for each in self.targets]
        return type(self)(self.images.to(device), self.mask.to(device), targets, self.original_sizes.to(device))


def autocast(options: WorkloadOptions) -> torch.autocast:
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def training_step(model: nn.Module, batches: Sequence[Any], loss: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    """Forward, loss, backward, clip and AdamW in the recipe's two groups, with each batch; returns the last loss."""
    model.train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if "backbone" not in name]},
        {"params": [p for name, p in named if "backbone" in name], "lr": 1e-5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)

    def run() -> Tensor:
        for batch in batches:
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return value.detach()

    return run


def inference(
    model: nn.Module,
    batches: Sequence[PlainBatch],
    device: torch.device,
    forward: Callable[[PlainBatch], dict[str, Any]],
) -> Callable[[], Any]:
    """With each batch, from the host to scores, labels and boxes in pixels on the device; returns the last ones."""
    model.eval()

    @torch.no_grad()
    def run() -> Any:
        for batch in batches:
            placed = batch.to(device)
            outputs = forward(placed)
            found = postprocess(outputs["pred_logits"], outputs["pred_boxes"], placed.original_sizes)
        return found

    return run
