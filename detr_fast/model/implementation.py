"""Which form of each replaceable operation a model and its loss run: chosen in one place, with the reason."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from detr_kernels import (
    AssignmentBackend,
    Backend,
    ConvolutionBackend,
    choose_assignment,
    choose_attention,
    choose_backend,
    choose_convolution,
)
from torch import nn

from detr_fast.config import Attention, Kernels, UserError

if TYPE_CHECKING:
    from detr_fast.model.detr import DETR


@dataclass(frozen=True)
class Implementation:
    """The form of each operation, under the names that `detr_kernels` gives them. Default: fused, in plain torch."""

    attention: Attention = "sdpa"
    convolution: ConvolutionBackend = "ref"
    """Resolved at each convolution by its size."""
    folded: bool = True
    """Whether a frozen batch norm is part of the convolution before it."""
    layer_norm: Backend = "ref"
    pixels: Backend = "ref"
    match_cost: Backend = "ref"
    assignment: AssignmentBackend = "auto"
    set_loss: Backend = "ref"
    reasons: dict[str, str] = field(default_factory=dict)
    """Operation -> its form and why, for people."""

    @property
    def packed(self) -> bool:
        """Whether attention takes the images' tokens one after another, without padding."""
        return self.attention in ("xformers", "triton")

    def apply_to(self, root: nn.Module) -> None:
        """Gives every module of `root` that has a choice its form. Weights are not touched."""
        for module in root.modules():
            if isinstance(module, Replaceable):
                module.use(self)


@runtime_checkable
class Replaceable(Protocol):
    """A module with an operation that has several forms."""

    def use(self, implementation: Implementation) -> None: ...


def choose_implementation(
    kernels: Kernels, attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Implementation:
    """Raises UserError where a form asked for by name cannot run on `device` in `dtype`."""
    try:
        return _choose(kernels, attention, device, dtype, head_dim)
    except RuntimeError as error:
        raise UserError(f"--kernels {kernels} --attention {attention}: {error}") from error


def _choose(
    kernels: Kernels, attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Implementation:
    if attention == "auto" and kernels != "auto":
        attention = kernels
    chosen: dict[str, tuple[Any, str]] = {
        "attention": choose_attention(device, dtype, head_dim, training=True, asked=attention),
        "layer_norm": choose_backend("fused_add_layer_norm", device, kernels),
        "pixels": choose_backend("normalize_pad", device, kernels),
        "match_cost": choose_backend("match_cost", device, kernels),
        "assignment": choose_assignment(device, "scipy" if kernels == "ref" else kernels),
        "set_loss": choose_backend("set_loss", device, kernels),
    }
    forms = {name: form for name, (form, _) in chosen.items()}
    chosen["1x1 convolution"] = choose_convolution(1, device, kernels, training=True)
    chosen["convolution"] = choose_convolution(3, device, kernels, training=True)
    folded = kernels != "ref"
    reasons = {name.replace("_", " "): f"{form} ({reason})" for name, (form, reason) in chosen.items()}
    reasons["frozen batch norm"] = "folded into convolutions" if folded else "by itself (--kernels ref)"
    return Implementation(**forms, convolution=kernels, folded=folded, reasons=reasons)


def select_implementation(
    model: "DETR", kernels: Kernels = "auto", attention: Attention = "auto", dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """Chooses for the device that `model` is on and gives it the forms; returns the reasons."""
    head_dim = model.config.hidden_dim // model.config.num_heads
    implementation = choose_implementation(kernels, attention, next(model.parameters()).device, dtype, head_dim)
    implementation.apply_to(model)
    return implementation.reasons
