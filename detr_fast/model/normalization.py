"""Convolution with batch norm: the one place where the backbone normalises, so that a faster form can replace it."""

from typing import Any

import torch
from detr_kernels import (
    ConvolutionBackend,
    OneDNNConvolution,
    choose_convolution,
    conv_bias_act,
    fold_frozen_bn,
    why_not_onednn,
)
from torch import Tensor, nn

from detr_fast.model.implementation import Implementation


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics and affine terms: y = x * scale + shift, eps 1e-5.

    `folded` chooses how `conv_norm_act` computes it: within the convolution, or as operations of its own.

    All four tensors are buffers, under the names that torchvision's BatchNorm2d uses, so its weights load as they are.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.folded = True
        self.convolution_form: ConvolutionBackend = "auto"
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def use(self, implementation: Implementation) -> None:
        self.folded, self.convolution_form = implementation.folded, implementation.convolution

    def joins_blocks(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a whole stage is computed by oneDNN (`detr_kernels.residual_stage`)."""
        form = self.folded and choose_convolution(1, device, self.convolution_form)[0]
        return form == "onednn" and why_not_onednn(dtype) is None

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) float32 each, so that norm(x) = x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def folded(conv: nn.Conv2d, norm: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is norm(conv(x)), the weight rounded to `dtype`; `norm`:
    FrozenBatchNorm2d, or BatchNorm2d as in evaluation mode."""
    return fold_frozen_bn(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, dtype)


class FoldedConvolution(nn.Module):
    """A convolution with its batch norm folded into it for good: for inference alone."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = folded(conv, norm)
        self.geometry = conv.stride[0], int(conv.padding[0]), conv.dilation[0]
        self.form: ConvolutionBackend = getattr(norm, "convolution_form", "auto")
        self.register_buffer("weight", weight.detach().to(dtype, memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach())
        self.packed: OneDNNConvolution | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """As `conv_norm_act`, but that the residual's memory may hold the result."""
        x = x.to(self.weight.dtype)
        if x.device.type == "cpu" and self.form == "auto" and not torch.compiler.is_compiling():
            if self.packed is None and why_not_onednn(x.dtype) is None:
                self.packed = OneDNNConvolution(self.weight, self.bias, *self.geometry)
            if self.packed is not None:
                return self.packed(x.contiguous(memory_format=torch.channels_last), residual, relu)
        return conv_bias_act(x, self.weight, self.bias, residual, *self.geometry, relu, self.form)


def computed_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a convolution of x: its weight's, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def conv_norm_act(
    x: Tensor, conv: nn.Conv2d | FoldedConvolution, norm: nn.Module, residual: Tensor | None = None, relu: bool = True
) -> Tensor:
    """relu(norm(conv(x)) + residual), (B, C_in, H, W) -> (B, C_out, H', W'); without a residual or ReLU where so asked.

    A folded norm becomes part of the convolution's weight and bias: the same function with the same gradients, one pass
    over memory instead of two. Folded in float32 at least; a half-precision weight is rounded once, afterwards.
    """
    if isinstance(conv, FoldedConvolution):
        return conv(x, residual, relu)
    if isinstance(norm, FrozenBatchNorm2d) and norm.folded:
        weight, bias = folded(conv, norm, computed_in(x, conv.weight))
        stride, padding, dilation = conv.stride[0], int(conv.padding[0]), conv.dilation[0]
        return conv_bias_act(x, weight, bias, residual, stride, padding, dilation, relu, norm.convolution_form)
    y = norm(conv(x))
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y
