"""Convolution with bias, residual and ReLU, of any size: the operation, its backends and where each can run.

    y = relu(conv(x, weight) + bias + residual)

triton: for 1x1 one GEMM with everything in it (`pointwise.py`); for other sizes the library's convolution, without a
bias, and one kernel for the rest (`epilogue.py`). cudnn, onednn: the library's fused call (`library.py`).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.convolution import epilogue, pointwise, pointwise_backward
from detr_kernels.convolution.geometry import as_under_autocast, channels_last, check_convolution
from detr_kernels.convolution.library import library_op, why_not_onednn_here
from detr_kernels.launch import DTYPES, unmeasured, why_not_triton
from detr_kernels.registry import Backend, Facts, Operation, Shape, zero_flop
from detr_kernels.specimens import IMAGES, meta


def _why_not_cudnn(facts: Facts) -> str | None:
    if facts.device.type != "cuda":
        return f"cuDNN does not run on {facts.device.type}"
    return _why_not_dtype(facts.dtype)


def _why_not_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in DTYPES else f"it does not compute in {str(dtype).removeprefix('torch.')}"


def _conv1x1_flop(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * weight[1]


def _input_gradient_flop(dy: Shape, out: Shape | None, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * weight[1]


def _weight_gradient_flop(dy: Shape, out: Shape | None, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * x[1]


def _library_flop(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _specimens() -> None:
    """Launch a 1x1 layer of each of ResNet-50's stages, a shortcut without a ReLU, and the 3x3 of layer3."""
    for inputs, outputs, height, width, stride, residual in (
        (64, 256, 200, 267, 1, True),
        (256, 128, 200, 267, 1, False),
        (1024, 256, 50, 67, 1, False),
        (512, 2048, 25, 34, 1, True),
        (256, 512, 200, 267, 2, False),
    ):
        x, weight = meta(IMAGES, inputs, height, width), meta(outputs, inputs, 1, 1)
        bias, relu = meta(outputs, dtype=torch.float32), stride == 1
        y = meta(IMAGES, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
        pointwise._forward(x, weight, bias, y if residual else None, stride, relu)
        mask = y if relu and not residual else None  # with a residual, dy is masked once for all
        pointwise_backward._input_gradient(y, mask, weight, height, width, stride)
        pointwise_backward._weight_gradient(y, mask, x, stride, False)
    conv, bias = meta(IMAGES, 256, 50, 67), meta(256, dtype=torch.float32)
    epilogue._backward(conv, epilogue._forward(conv, bias, None, True))


OPERATION = Operation(
    "convolution",
    (
        Backend("onednn", why_not_onednn_here, reason="oneDNN adds bias and residual and applies the ReLU itself"),
        Backend("cudnn", _why_not_cudnn, unmeasured),
        Backend("triton", lambda facts: why_not_triton(facts.device) or _why_not_dtype(facts.dtype), unmeasured),
        Backend("ref"),
    ),
    flop={
        "conv1x1_bias_act": _conv1x1_flop,
        "conv1x1_input_gradient": _input_gradient_flop,
        "conv1x1_weight_gradient": _weight_gradient_flop,
        "conv_bias_act_library": _library_flop,
        "bias_act": zero_flop,
        "bias_act_backward": zero_flop,
    },
    specimens=_specimens,
)


def conv_bias_act_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """Compute `conv_bias_act` in plain torch, in place after the convolution."""
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation)
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y


def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Compute `relu(F.conv2d(x, weight, bias, stride, padding, dilation) + residual)`; residual and relu are optional.

    x (B, C, H, W), weight (N, C, h, w), bias (N,), residual and result (B, N, H', W'), channels-last except with `ref`,
    which keeps x's layout. Under autocast it computes in autocast's dtype. triton: for 1x1 of stride 1 or 2 without
    padding one GEMM with everything in it, otherwise the library's convolution and one kernel after it, which adds the
    bias in float32. cudnn: one call where there is a ReLU, plain torch without one; onednn: one call. Raises ValueError
    for shapes or dtypes that do not fit and RuntimeError where what is asked for cannot run.
    """
    x, weight, residual = as_under_autocast(x, weight, residual)
    check_convolution(x, weight, bias, residual, stride, padding, dilation)
    chosen = OPERATION.choose(Facts(x.device, x.dtype), backend).backend
    if chosen == "ref" or (chosen == "cudnn" and not relu):
        return conv_bias_act_ref(x, weight, bias, residual, stride, padding, dilation, relu)
    if chosen in ("cudnn", "onednn"):
        return library_op(x, weight, bias, residual, stride, padding, dilation, relu, chosen)
    if weight.shape[2:] == (1, 1) and padding == 0 and stride in (1, 2):
        return pointwise.forward_op(x, weight, bias, residual, stride, relu)
    conv = F.conv2d(channels_last(x), weight, None, stride, padding, dilation)
    return epilogue.forward_op(conv, bias, residual, relu)
