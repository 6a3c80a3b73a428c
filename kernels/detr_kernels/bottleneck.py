"""A ResNet's bottleneck block on a CPU, both passes whole: what is added is added by the products themselves.

    out = relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x))          shortcut: a convolution, or x as it is

oneDNN adds a convolution to what lies in its result's memory: the sum is made where the shortcut's result lies, or in a
copy of x. In the backward pass conv1's matrix product adds to the gradient that comes through the shortcut; the other
1x1 gradients are matrix products too, and each ReLU's mask is applied in place. (He et al. 2016, figure 5.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.convolution import output_shape
from detr_kernels.convolution_library import (
    add_convolution,
    as_rows,
    convolve,
    pointwise_weight_gradient,
    why_not_onednn,
)
from detr_kernels.convolution_tiles import channels_last, image_room


def bottleneck_ref(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int = 1, dilation: int = 1
) -> Tensor:
    """The same in plain torch."""
    shortcut = x if len(weights) == 3 else F.conv2d(x, weights[3], biases[3].to(x.dtype), stride)
    bias1, bias2, bias3 = (bias.to(x.dtype) for bias in biases[:3])
    x = F.conv2d(x, weights[0], bias1).relu()
    x = F.conv2d(x, weights[1], bias2, stride, dilation, dilation).relu()
    return (F.conv2d(x, weights[2], bias3) + shortcut).relu()


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (B, N, H', W'), and what conv2 (B, M, H, W) and conv3 (B, M, H', W') see; all channels-last."""
    x, weights = channels_last(x), [channels_last(weight) for weight in weights]
    biases = [bias.to(x.dtype) for bias in biases]
    narrow = convolve(x, weights[0], biases[0], 1, 0, 1, relu=True)
    spread = convolve(narrow, weights[1], biases[1], stride, dilation, dilation, relu=True)
    out = x.clone() if len(weights) == 3 else convolve(x, weights[3], biases[3], stride, 0, 1, relu=False)
    return add_convolution(out, spread, weights[2], biases[2], 1, 0, 1, relu=True), narrow, spread


forward_op = torch.library.custom_op("detr_kernels::bottleneck", _forward, mutates_args=())


@forward_op.register_fake
def _(x, weights, biases, stride, dilation):
    narrow = image_room(x, weights[0].shape[0], *x.shape[2:])
    spread = image_room(narrow, *output_shape(narrow, weights[1], stride, dilation, dilation)[1:])
    return image_room(spread, weights[2].shape[0], *spread.shape[2:]), narrow, spread


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, _, ctx.stride, ctx.dilation = inputs
    ctx.save_for_backward(x, *output, *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _mask(dy: Tensor, y: Tensor) -> Tensor:
    """A ReLU's gradient, in dy's own memory."""
    return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)


def _product(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a 1x1 convolution's input, at stride 1."""
    dx = image_room(dy, weight.shape[1], *dy.shape[2:])
    torch.mm(as_rows(dy), weight.flatten(1), out=as_rows(dx))
    return dx


def _autograd(ctx: Any, dout: Tensor, *_: None) -> tuple[Any, ...]:
    """Gradients of x and of the weights; the biases are a frozen norm's, and have none."""
    x, out, narrow, spread, weight1, weight2, weight3, *shortcut = ctx.saved_tensors
    stride, dilation = ctx.stride, ctx.dilation
    dout = torch.ops.aten.threshold_backward(channels_last(dout), out, 0)
    dweight3 = pointwise_weight_gradient(dout, spread, weight3)
    dspread = _mask(_product(dout, weight3), spread)
    sides = [stride] * 2, [dilation] * 2, [dilation] * 2
    dnarrow, dweight2, _ = torch.ops.aten.convolution_backward(
        dspread, narrow, weight2, None, *sides, False, [0, 0], 1, [True, True, False]
    )
    dnarrow = _mask(dnarrow, narrow)
    dweights = [pointwise_weight_gradient(dnarrow, x, weight1), dweight2, dweight3]
    dweights += [pointwise_weight_gradient(dout, x, weight, stride) for weight in shortcut]
    dx = None
    if ctx.needs_input_grad[0] and shortcut:
        dx = _product(dnarrow, weight1)
        dx[:, :, ::stride, ::stride].add_(_product(dout, *shortcut))
    elif ctx.needs_input_grad[0]:
        dx = dout
        torch.addmm(as_rows(dx), as_rows(dnarrow), weight1.flatten(1), out=as_rows(dx))
    return dx, dweights, [None] * len(dweights), None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def bottleneck(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int = 1, dilation: int = 1
) -> Tensor:
    """A bottleneck block of x (B, C, H, W) on a CPU -> (B, N, H', W'), channels-last.

    `weights` and `biases`: of conv1 (M, C, 1, 1), conv2 (M, M, 3, 3), which has the stride and the dilation, conv3
    (N, M, 1, 1), and the shortcut's convolution (N, C, 1, 1), with the stride, unless the shortcut is x itself. Batch
    norm is folded into them, and biases get no gradient. x and weights are in one dtype, in which oneDNN must compute
    (`why_not_onednn`); biases may be float32. Raises ValueError for other devices and dtypes.
    """
    problem = why_not_onednn(x.dtype) if x.device.type == "cpu" else f"it runs on a CPU, not on {x.device.type}"
    if problem or any(weight.dtype != x.dtype for weight in weights):
        raise ValueError(f"bottleneck: {problem or 'x and weights must have one dtype'}. Use bottleneck_ref.")
    return forward_op(x, weights, biases, stride, dilation)[0]
