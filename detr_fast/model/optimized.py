"""Optimisation of a network for inference alone: batch norm folded, weights rounded once to the dtype it runs in."""

import copy

import torch
from torch import nn

from detr_fast.config import require
from detr_fast.model.backbone import BasicBlock, Bottleneck, ResNet, Stage, TinyResNet
from detr_fast.model.backends import hand_out
from detr_fast.model.detr import DETR
from detr_fast.model.normalization import FoldedConvolution
from detr_fast.model.timm_backbone import TimmBackbone

NORM_AFTER = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
"""Attribute of a block's convolution -> that of the norm that follows it."""


class OptimizedDETR(DETR):
    """A DETR that `optimized` made: it cannot be trained, and its weights cannot be exported."""

    def train(self, mode: bool = True) -> "OptimizedDETR":
        """Stay in evaluation mode. Raises UserError where training mode is asked for."""
        require(not mode, "This model was optimised for inference alone: load it without optimize=True.")
        super().train(False)
        return self


@torch.no_grad()
def optimized(network: DETR, dtype: torch.dtype) -> OptimizedDETR:
    """Copy `network`, in evaluation mode, into one that computes the same in `dtype`, faster.

    Batch norm is folded into the convolutions before it, exactly, and weights are rounded to `dtype` once instead of in
    every call; layer norms keep float32.
    """
    if isinstance(network, OptimizedDETR):
        return network
    made = copy.deepcopy(network).eval().requires_grad_(False)
    if isinstance(made.backbone, TimmBackbone):
        made.backbone.fold_norms()
    for module in list(made.backbone.modules()):
        if isinstance(module, ResNet | TinyResNet | Bottleneck | BasicBlock):
            _fold_norms(module, dtype)
    hand_out(network.selection, made)
    for module in made.modules():
        if not isinstance(module, nn.LayerNorm | FoldedConvolution):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    made.__class__ = OptimizedDETR  # the same modules and forward pass
    return made  # type: ignore[return-value]


def _fold_norms(block: nn.Module, dtype: torch.dtype) -> None:
    for conv, norm in NORM_AFTER.items():
        if hasattr(block, conv):
            setattr(block, conv, FoldedConvolution(getattr(block, conv), getattr(block, norm), dtype))
            setattr(block, norm, nn.Identity())
    shortcut = getattr(block, "downsample", None)
    if shortcut is not None:
        conv, norm = shortcut
        block.downsample = nn.Sequential(FoldedConvolution(conv, norm, dtype), nn.Identity())
    for name, stage in block.named_children():
        if isinstance(stage, Stage):  # which is one operation only where its norms are folded in every call
            setattr(block, name, nn.Sequential(*stage))
