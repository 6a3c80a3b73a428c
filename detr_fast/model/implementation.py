"""The form that each replaceable operation of a model and its loss has; `detr_fast.runtime` chooses it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from detr_kernels import AssignmentBackend, AttentionBackend, Backend, ConvolutionBackend
from torch import nn


@dataclass(frozen=True)
class Implementation:
    """What each operation is asked to run as, in the words of `detr_kernels`: `auto` is decided where it is called, so
    that a model that moves to another device or dtype afterwards still runs."""

    attention: AttentionBackend = "sdpa"
    """sdpa and ref keep each image's tokens in a row of their own; the others take them packed."""
    convolution: ConvolutionBackend = "auto"
    folded: bool = True
    """Whether a frozen batch norm is part of the convolution before it."""
    frozen: bool = True
    """Whether inference folds and rounds weights once (`detr_fast.model.optimized`), or in every call."""
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
class Replaceable(Protocol):
    """A module with an operation that has several forms."""

    def use(self, implementation: Implementation) -> None: ...
