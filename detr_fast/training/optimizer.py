"""AdamW with DETR's two groups, or with Muon beside it, and the learning rate as a function of the step alone."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from detr_fast.training.muon import MuonAdamW, hidden_matrices


def build_optimizer(
    model: nn.Module, lr: float, lr_backbone: float, weight_decay: float, muon: bool = False
) -> torch.optim.AdamW:
    """Build AdamW: the backbone, by its name, gets its own learning rate; decay is on all, and launches are fused.

    With `muon`, hidden matrices are a group of their own, the first, which follows Muon's rule.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if muon:
        matrices = hidden_matrices(model)
        first = {"params": [each for _, each in trained if each in matrices], "lr": lr, "base_lr": lr, "muon": True}
        trained = [(name, each) for name, each in trained if each not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if "backbone" not in name], "lr": lr},
        {"params": [parameter for name, parameter in trained if "backbone" in name], "lr": lr_backbone},
    ]
    groups = [group | {"base_lr": group["lr"]} for group in groups if group["params"]]
    if muon:
        return MuonAdamW([first, *(group | {"muon": False} for group in groups)], weight_decay=weight_decay, fused=True)
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


UNPLANNED_STEPS = 1 << 40
"""A schedule's end as long as none is planned: learning rates begin alike whatever it will be."""


@dataclass(frozen=True)
class Schedule:
    """The factor on every learning rate at an optimizer step; it has no state, so nothing of it is saved."""

    kind: Literal["step", "cosine"]
    total_steps: int
    drop_step: int
    warmup_steps: int

    def of(self, total_steps: int) -> Self:
        """Return the same over another number of steps; warm-up stays."""
        drop_step = round(self.drop_step * total_steps / max(1, self.total_steps))
        return replace(self, total_steps=total_steps, drop_step=drop_step)

    def factor(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.kind == "step":
            return warmup * 0.1 ** (step // max(1, self.drop_step))
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.total_steps)))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        factor = self.factor(step)
        for group in optimizer.param_groups:
            lr = group["base_lr"] * factor
            if isinstance(group["lr"], Tensor):  # of a captured step, which reads it on the device
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
