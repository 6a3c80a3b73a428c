"""A model for inference alone: what does not depend on the image is computed once, in the precision it runs in."""

import copy

import torch
from torch import nn

from detr_fast.model.backbone import BasicBlock, Bottleneck, ResNet, TinyResNet
from detr_fast.model.detr import DETR
from detr_fast.model.normalization import FoldedConvolution

CONVOLUTIONS = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
"""Attribute of a block to that of the norm that follows it."""


@torch.no_grad()
def frozen(model: DETR, dtype: torch.dtype) -> DETR:
    """A copy of `model`, in evaluation mode, that computes the same in `dtype`, and cannot be trained or saved.

    Batch norm is folded into the convolutions before it, exactly, and weights are rounded to `dtype` once instead of
    in every call; layer norms keep float32.
    """
    if model.frozen:
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.backbone.modules()):
        if isinstance(module, ResNet | TinyResNet | Bottleneck | BasicBlock):
            _fold(module, dtype)
    norms = {id(norm) for norm in model.modules() if isinstance(norm, nn.LayerNorm)}
    for module in model.modules():
        if id(module) not in norms and not isinstance(module, FoldedConvolution):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    model.frozen = True
    return model


def _fold(block: nn.Module, dtype: torch.dtype) -> None:
    for conv, norm in CONVOLUTIONS.items():
        if hasattr(block, conv):
            setattr(block, conv, FoldedConvolution(getattr(block, conv), getattr(block, norm), dtype))
            setattr(block, norm, nn.Identity())
    shortcut = getattr(block, "downsample", None)
    if shortcut is not None:
        conv, norm = shortcut
        block.downsample = nn.Sequential(FoldedConvolution(conv, norm, dtype), nn.Identity())
