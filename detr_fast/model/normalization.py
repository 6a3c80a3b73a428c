"""Convolution with batch norm, and the folding of one into the other."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from detr_kernels import OneDNNConvolution, Selection, conv_bias_act, fold_frozen_bn
from detr_kernels.convolution.batch_norm import frozen_bn_scale_and_shift, scale_weight, scale_weights
from torch import Tensor, nn

from detr_fast.model.backends import Selectable
from detr_fast.model.cached import Cached


class FrozenBatchNorm2d(Selectable):
    """Batch norm with constant statistics and affine terms: y = x * scale + shift, eps 1e-5.

    All four tensors are buffers, under the names that torchvision's BatchNorm2d uses, so its weights load as they are.
    `conv_norm_act` folds it into the convolution before it, unless its backend is ref.
    """

    operations = ("frozen_batch_norm", "convolution", "packed_convolution")
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.cached: dict[tuple[str, torch.dtype], Cached] = defaultdict(Cached)
        """Values computed from the four tensors, and the folded weight of a convolution that does not
        learn, by dtype."""
        self.register_load_state_dict_post_hook(_refresh)
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def use(self, selection: Selection) -> None:
        super().use(selection)
        self.cached.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> "FrozenBatchNorm2d":
        """Move or cast the tensors, as `to` does; the cached values are void."""
        self.cached.clear()
        return super()._apply(*args, **kwargs)

    @property
    def folds(self) -> bool:
        """Tell whether it is folded into the convolution before it."""
        return self.backend("frozen_batch_norm") != "ref"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def scale_and_shift(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """Return scale and shift (C,) in `dtype`, so that norm(x) = x * scale + shift."""
        given = self.tensors()
        return self.cached["norm", dtype](given, lambda: frozen_bn_scale_and_shift(*given, self.eps, dtype))

    def shift(self, dtype: torch.dtype, rounded_to: torch.dtype) -> Tensor:
        """Return the shift (C,), computed in `dtype` and rounded."""
        shift = self.scale_and_shift(dtype)[1]
        return self.cached["shift", rounded_to](self.tensors(), lambda: [shift.to(rounded_to)])[0]

    def scale_like(self, weight: Tensor) -> Tensor:
        """Return the scale in the shape, dtype and memory order of a convolution's weight (C, ., ., .)."""
        scale = self.scale_and_shift(weight.dtype)[0]
        expanded = lambda: [torch.empty_like(weight).copy_(scale[:, None, None, None])]  # noqa: E731
        return self.cached["scale", weight.dtype](self.tensors(), expanded)[0]

    def scaled(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply the weight of the convolution before the norm by the scale, and round to `dtype`."""
        scale = self.scale_and_shift(torch.promote_types(weight.dtype, torch.float32))[0]
        if weight.requires_grad:
            return scale_weight(weight, scale, dtype)
        return self.cached["weight", dtype]((*self.tensors(), weight), lambda: [scale_weight(weight, scale, dtype)])[0]

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(self.weight.dtype)
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


def _refresh(norm: FrozenBatchNorm2d, _: Any) -> None:
    """Recompute cached values in place after a state dict was loaded: the replay of a captured graph reads them."""
    for cached in norm.cached.values():
        cached.refresh()


Fold = tuple[Tensor, Tensor]
"""Weight and bias of a convolution with its norm in it."""


def folded(conv: nn.Conv2d, norm: Any, dtype: torch.dtype) -> Fold:
    """Fold `norm`, FrozenBatchNorm2d, or BatchNorm2d as in evaluation mode, into the convolution before it.

    Both are computed in float32 at least. The weight is rounded to `dtype`; so is the bias, except for our kernels.
    """
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.scaled(conv.weight, dtype), norm.shift(wide(conv.weight), bias_dtype(conv, norm, dtype))
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight, bias = fold_frozen_bn(conv.weight, *tensors, norm.eps, dtype)
    return weight, bias.to(bias_dtype(conv, norm, dtype))


def wide(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a norm is folded into `weight`: float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def bias_dtype(conv: nn.Conv2d, norm: Any, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the bias is added: float32 in our kernels, that of their inputs in libraries."""
    ours = isinstance(norm, Selectable) and norm.backend("convolution", conv.weight.device, dtype) == "triton"
    return wide(conv.weight) if ours else dtype


def folded_together(pairs: Sequence[tuple[nn.Conv2d, FrozenBatchNorm2d]], dtype: torch.dtype) -> list[Fold]:
    """Fold several norms into the convolutions before them; `foreach`, where all weights learn, takes few launches."""
    weights = [conv.weight for conv, _ in pairs]
    learn = all(weight.requires_grad and weight.dtype == wide(weight) for weight in weights)
    backend = pairs[0][1].backend("frozen_batch_norm", weights[0].device, dtype)
    if backend != "foreach" or not learn or torch.compiler.is_compiling():
        return [folded(*pair, dtype) for pair in pairs]
    scales = [norm.scale_like(conv.weight) for conv, norm in pairs]
    biases = [norm.shift(wide(conv.weight), bias_dtype(conv, norm, dtype)) for conv, norm in pairs]
    return list(zip(scale_weights(weights, scales, dtype), biases, strict=True))


class FoldedConvolution(Selectable):
    """A convolution with its batch norm folded into it for good: for inference alone."""

    operations = ("convolution", "packed_convolution")
    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = folded(conv, norm, dtype)
        self.geometry = conv.stride[0], int(conv.padding[0]), conv.dilation[0]
        self.eval()
        self.register_buffer("weight", weight.detach().to(dtype, memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach())
        self.packed: OneDNNConvolution | None = None
        self.register_load_state_dict_post_hook(_unpack)

    def _apply(self, *args: Any, **kwargs: Any) -> "FoldedConvolution":
        """Do what `to` and its like ask: the weight is packed anew where and as it lies then."""
        self.packed = None
        return super()._apply(*args, **kwargs)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """Compute relu(conv(x) + residual) as `conv_norm_act` does; may overwrite `residual`."""
        x = x.to(self.weight.dtype)
        packs = self.backend("packed_convolution", x.device, x.dtype) == "onednn"
        if not packs or torch.compiler.is_compiling():
            return conv_bias_act(x, self.weight, self.bias, residual, *self.geometry, relu, self.backend("convolution"))
        if self.packed is None:
            self.packed = OneDNNConvolution(self.weight, self.bias, *self.geometry)
        return self.packed(x.contiguous(memory_format=torch.channels_last), residual, relu)


def _unpack(convolution: FoldedConvolution, _: Any) -> None:
    """Forget the packed weight after a state dict was loaded: it is a copy of the one before."""
    convolution.packed = None


def computed_in(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of a convolution of x: its weight's, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def conv_norm_act(
    x: Tensor,
    conv: nn.Conv2d | FoldedConvolution,
    norm: nn.Module,
    residual: Tensor | None = None,
    relu: bool = True,
    fold: Fold | None = None,
) -> Tensor:
    """Compute relu(norm(conv(x)) + residual), (B, C_in, H, W) -> (B, C_out, H', W'); residual and ReLU are optional.

    A folded norm becomes part of the convolution's weight and bias: the same function with the same gradients, one pass
    over memory instead of two. It is folded in float32 at least; a half-precision weight is rounded once, afterwards.
    `fold` is the result of `folded`, where it was computed before.
    """
    if isinstance(conv, FoldedConvolution):
        return conv(x, residual, relu)
    if isinstance(norm, FrozenBatchNorm2d) and norm.folds:
        weight, bias = fold or folded(conv, norm, computed_in(x, conv.weight))
        stride, padding, dilation = conv.stride[0], int(conv.padding[0]), conv.dilation[0]
        return conv_bias_act(x, weight, bias, residual, stride, padding, dilation, relu, norm.backend("convolution"))
    y = norm(conv(x))
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y
