"""Which form of each replaceable operation a model and its loss run: chosen in one place, with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from detr_kernels import (
    AssignmentBackend,
    AttentionBackend,
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
    """What each operation is asked to run as, in the words of `detr_kernels`: `auto` is decided where it is called, so
    that a model that moves to another device or dtype afterwards still runs."""

    attention: AttentionBackend = "sdpa"
    """sdpa and ref keep each image's tokens in a row of their own; the others take them packed."""
    convolution: ConvolutionBackend = "auto"
    folded: bool = True
    """Whether a frozen batch norm is part of the convolution before it."""
    layer_norm: Backend = "auto"
    pixels: Backend = "auto"
    match_cost: Backend = "auto"
    assignment: AssignmentBackend = "auto"
    set_loss: Backend = "auto"

    @property
    def packed(self) -> bool:
        """Whether attention takes the images' tokens one after another, without padding."""
        return self.attention not in ("sdpa", "ref")

    def apply_to(self, root: nn.Module) -> None:
        """Gives every module of `root` that has a choice its form. Weights are not touched."""
        for module in root.modules():
            if isinstance(module, Replaceable):
                module.use(self)


@runtime_checkable
class FoldsNorm(Protocol):
    """A frozen batch norm that may be part of the convolution before it."""

    folded: bool


@runtime_checkable
class Replaceable(Protocol):
    """A module with an operation that has several forms."""

    def use(self, implementation: Implementation) -> None: ...


def select_implementation(
    model: "DETR", kernels: Kernels = "auto", attention: Attention = "auto", dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """Gives `model` its forms, for the device it is on and products in `dtype`; returns what runs, and why.

    Raises UserError where a form asked for by name cannot run there.
    """
    if attention == "auto" and kernels != "auto":
        attention = kernels
    device, config = next(model.parameters()).device, model.config
    try:
        form, reason = choose_attention(device, dtype, config.hidden_dim // config.num_heads, True, attention)
        frozen_norm = any(isinstance(module, FoldsNorm) for module in model.modules())
        reasons = {"attention": f"{form} ({reason})"} | dict(_reasons(kernels, device, frozen_norm))
    except RuntimeError as error:
        raise UserError(f"--kernels {kernels} --attention {attention}: {error}") from error
    implementation = Implementation(
        # torch's own attention is faster on rows than on packed tokens, which it would have to pad again
        attention="sdpa" if form == "sdpa" else attention,
        convolution=kernels,
        folded=kernels != "ref",
        layer_norm=kernels,
        pixels=kernels,
        match_cost=kernels,
        assignment="scipy" if kernels == "ref" else kernels,
        set_loss=kernels,
    )
    implementation.apply_to(model)
    return reasons


def _reasons(kernels: Kernels, device: torch.device, frozen_norm: bool) -> Iterator[tuple[str, str]]:
    """Operation -> its form and why; convolutions only where the backbone has frozen batch norm to fold into them."""
    chosen: dict[str, tuple[str, str]] = {
        "layer norm": choose_backend("fused_add_layer_norm", device, kernels),
        "pixels": choose_backend("normalize_pad", device, kernels),
        "match cost": choose_backend("match_cost", device, kernels),
        "assignment": choose_assignment(device, "scipy" if kernels == "ref" else kernels),
        "set loss": choose_backend("set_loss", device, kernels),
    }
    if frozen_norm:
        yield "frozen batch norm", "by itself (--kernels ref)" if kernels == "ref" else "folded into convolutions"
        chosen["1x1 convolution"] = choose_convolution(1, device, kernels, training=True)
        chosen["convolution"] = choose_convolution(3, device, kernels, training=True)
    for name, (form, reason) in chosen.items():
        yield name, f"{form} ({reason})"
