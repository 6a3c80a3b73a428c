"""Convolution, bias, residual and ReLU in one call of the library: cuDNN's on a GPU, oneDNN's on a CPU.

    y = relu(conv(x, weight) + bias + residual)

Backward: the ReLU's mask, and the library's gradients of a convolution; for 1x1 on a CPU the GEMMs that they are.
Saved for it are x, the weight, and y where there is a ReLU.
"""

import os
from typing import Any

import torch
from torch import Tensor

from detr_kernels.convolution.geometry import channels_last, empty_image, output_shape
from detr_kernels.registry import Backend, Facts, Operation

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(2**14))
"""oneDNN compiles every convolution for its shape, and by itself keeps 1,024: six sizes of images, in a network of 54
convolutions with their gradients. It reads the variable at its first one; each takes some 50 KiB."""


@torch.compiler.assume_constant_result
def why_not_onednn(dtype: torch.dtype) -> str | None:
    """Say why oneDNN cannot compute in `dtype` on this processor; None where it can."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN is not there, or switched off"
    fast = torch.float32, *((torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ())
    return (
        None if dtype in fast else f"oneDNN does not compute in {str(dtype).removeprefix('torch.')} on this processor"
    )


def why_not_onednn_here(facts: Facts) -> str | None:
    """Say why oneDNN cannot compute there; None where it can."""
    if facts.device.type != "cpu":
        return f"oneDNN runs on a CPU, not on {facts.device.type}"
    return why_not_onednn(facts.dtype)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int, *, relu: bool
) -> Tensor:
    """Compute a convolution with its bias and ReLU by oneDNN, of channels-last tensors of one dtype."""
    geometry, act = ([padding] * 2, [stride] * 2, [dilation] * 2, 1), "relu" if relu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias.contiguous(), *geometry, act, [], "")


def add_convolution(
    total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int, *, relu: bool
) -> Tensor:
    """Add a convolution to `total` in its memory, then apply the ReLU; returns `total`."""
    geometry, act = ([padding] * 2, [stride] * 2, [dilation] * 2, 1), "relu" if relu else None
    operands = total, x, weight, bias.contiguous()
    return torch.ops.mkldnn._convolution_pointwise_.binary(*operands, *geometry, "add", 1.0, act, [], None)


def _library(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
    library: str,
) -> Tensor:
    """Call the library. The bias is added in x's dtype; cuDNN always applies a ReLU, and its float32 may be TF32."""
    x, weight, bias = channels_last(x), channels_last(weight), bias.to(x.dtype)
    residual = None if residual is None else channels_last(residual)
    if library == "onednn":
        convolution = x, weight, bias, stride, padding, dilation
        if residual is None:
            return convolve(*convolution, relu=relu)
        # oneDNN's call with a new result copies the residual too, several times as slowly
        return add_convolution(residual.clone(), *convolution, relu=relu)
    stride_, padding_, dilation_ = [stride] * 2, [padding] * 2, [dilation] * 2
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride_, padding_, dilation_, 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride_, padding_, dilation_, 1)


class OneDNNConvolution:
    """Runs one convolution of constant weight on a CPU, for inference.

    Its weight is stored in the order that oneDNN chose for the first image, and its result in the residual's memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, padding: int, dilation: int) -> None:
        self.weight, self.bias = weight, bias.to(weight.dtype)
        self.geometry = stride, padding, dilation
        self.packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed weight, which cannot be copied or pickled: it is packed anew."""
        return self.__dict__ | {"packed": None}

    @torch.no_grad()
    def __call__(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """Convolve x; `residual`, where there is one, is overwritten and returned. Both are in channels-last memory."""
        if self.packed is None:
            stride, padding, dilation = ([each] * 2 for each in self.geometry)
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self.packed = reorder(self.weight, padding, stride, dilation, 1, list(x.shape))
        constants = (x, self.packed, self.bias, *self.geometry)
        return convolve(*constants, relu=relu) if residual is None else add_convolution(residual, *constants, relu=relu)


def _why_not_packed(facts: Facts) -> str | None:
    if facts.training:
        return "weights change in training"
    if facts.compiled:
        return "torch.compile packs weights by itself"
    return why_not_onednn_here(facts)


PACKED = Operation(
    "packed_convolution",
    (Backend("onednn", _why_not_packed, reason="weights lie in the order in which oneDNN reads them"), Backend("ref")),
    mode="inference",
)
"""Convolutions of a network that is optimised for inference; ref leaves each to `conv_bias_act`."""


library_op = torch.library.custom_op("detr_kernels::conv_bias_act_library", _library, mutates_args=())


@library_op.register_fake
def _(x, weight, bias, residual, stride, padding, dilation, relu, library):
    return empty_image(x, *output_shape(x, weight, stride, padding, dilation)[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save both x and weight, which the library's gradients take whichever is wanted."""
    x, weight, bias, _, *ctx.geometry, relu, library = inputs
    # for 1x1, oneDNN's gradients take 1.3 (stride 1) to 9 times (stride 2) as long as the GEMMs that they are
    ctx.by_gemm = library == "onednn" and weight.shape[2:] == (1, 1) and ctx.geometry[1] == 0
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, output if relu else None)


def as_rows(images: Tensor) -> Tensor:
    """View (B, C, H, W) as rows (B H W, C)."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def pointwise_weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    return (as_rows(dz).t() @ as_rows(x[:, :, ::stride, ::stride])).view(weight.shape)


def _strided_input_gradient(dz: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Compute dx of a 1x1 convolution, which sees one pixel of stride^2: the others' gradient is 0."""
    dx = empty_image(x, *x.shape[1:]).zero_()
    seen = dx[:, :, ::stride, ::stride]
    images, _, height, width = seen.shape
    seen.copy_((as_rows(dz) @ weight.flatten(1)).view(images, height, width, -1).permute(0, 3, 1, 2))
    return dx


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
    dz = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    dx = dweight = None
    if ctx.by_gemm and wants_weight:
        dweight, wants_weight = pointwise_weight_gradient(dz, x, weight, ctx.geometry[0]), False
    if ctx.by_gemm and wants_x and ctx.geometry[0] > 1:
        dx, wants_x = _strided_input_gradient(dz, x, weight, ctx.geometry[0]), False
    if wants_x or wants_weight:
        geometry = *([each] * 2 for each in ctx.geometry), False, [0, 0], 1
        mask = [wants_x, wants_weight, False]
        by_library = torch.ops.aten.convolution_backward(dz, x, weight, None, *geometry, mask)
        dx, dweight = by_library[0] if wants_x else dx, by_library[1] if wants_weight else dweight
    dbias = dz.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if wants_bias else None
    return dx, dweight, dbias, dz if wants_residual else None, *[None] * 5


library_op.register_autograd(_autograd, setup_context=_setup_context)
