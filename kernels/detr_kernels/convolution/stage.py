"""A ResNet stage, its bottleneck blocks in one operator: on a CPU the GEMMs themselves add the shortcuts.

    x = relu(conv3(relu(conv2(relu(conv1(x))))) + shortcut(x))      for each block; shortcut: x itself, but in the first

oneDNN adds a convolution to what its output's memory holds: the shortcut's result, or a copy of x, and x itself where
no gradient is wanted. In the backward pass conv1's GEMM adds to the gradient that comes through the shortcut; the other
1x1 gradients are GEMMs too, and each ReLU's mask is applied in place. (He et al. 2016, figure 5.)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.convolution.geometry import channels_last, empty_image, output_shape
from detr_kernels.convolution.library import (
    add_convolution,
    as_rows,
    convolve,
    pointwise_weight_gradient,
    why_not_onednn_here,
)
from detr_kernels.registry import Backend, Facts, Operation, Shape


def blocks_of(convolutions: Sequence[Any]) -> list[Sequence[Any]]:
    """Group by block: four convolutions, the last of which is the shortcut's, then three and three."""
    return [convolutions[:4], *(convolutions[first : first + 3] for first in range(4, len(convolutions), 3))]


def residual_stage_ref(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilations: Sequence[int]
) -> Tensor:
    """Compute `residual_stage` in plain torch."""
    for weight, bias, dilation in zip(blocks_of(weights), blocks_of(biases), dilations, strict=True):
        bias = [each.to(x.dtype) for each in bias]
        shortcut = F.conv2d(x, weight[3], bias[3], stride) if len(weight) == 4 else x
        x = F.conv2d(x, weight[0], bias[0]).relu()
        x = F.conv2d(x, weight[1], bias[1], stride, dilation, dilation).relu()
        x = (F.conv2d(x, weight[2], bias[2]) + shortcut).relu()
        stride = 1
    return x


def _forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, dilations: Sequence[int], save: bool
) -> list[Tensor]:
    """Compute the last block's output; with `save` each block's output, conv1 and conv2 outputs, all channels-last."""
    x, weights = channels_last(x), [channels_last(weight) for weight in weights]
    biases = [bias.to(x.dtype) for bias in biases]
    results: list[Tensor] = []
    for weight, bias, dilation in zip(blocks_of(weights), blocks_of(biases), dilations, strict=True):
        conv1_out = convolve(x, weight[0], bias[0], 1, 0, 1, relu=True)
        conv2_out = convolve(conv1_out, weight[1], bias[1], stride, dilation, dilation, relu=True)
        if len(weight) == 4:
            x = convolve(x, weight[3], bias[3], stride, 0, 1, relu=False)
        elif save:
            x = x.clone()
        x = add_convolution(x, conv2_out, weight[2], bias[2], 1, 0, 1, relu=True)
        results = [*results, x, conv1_out, conv2_out] if save else [x]
        stride = 1
    return results


forward_op = torch.library.custom_op("detr_kernels::residual_stage", _forward, mutates_args=())


@forward_op.register_fake
def _(x, weights, biases, stride, dilations, save):
    results: list[Tensor] = []
    for weight, dilation in zip(blocks_of(weights), dilations, strict=True):
        conv1_out = empty_image(x, weight[0].shape[0], *x.shape[2:])
        conv2_out = empty_image(conv1_out, *output_shape(conv1_out, weight[1], stride, dilation, dilation)[1:])
        x, stride = empty_image(conv2_out, weight[2].shape[0], *conv2_out.shape[2:]), 1
        results = [*results, x, conv1_out, conv2_out] if save else [x]
    return results


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, _, ctx.stride, ctx.dilations, _ = inputs
    ctx.results = len(output)
    ctx.save_for_backward(x, *output, *weights)
    ctx.mark_non_differentiable(*output[:-3], *output[-2:])
    ctx.set_materialize_grads(False)


def _relu_gradient_(dy: Tensor, y: Tensor) -> Tensor:
    """Apply a ReLU's gradient in dy's own memory."""
    return torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of a 1x1 convolution's input, at stride 1."""
    dx = empty_image(dy, weight.shape[1], *dy.shape[2:])
    torch.mm(as_rows(dy), weight.flatten(1), out=as_rows(dx))
    return dx


def _block_backward(
    dout: Tensor,
    x: Tensor,
    conv1_out: Tensor,
    conv2_out: Tensor,
    weight: Sequence[Tensor],
    stride: int,
    dilation: int,
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Compute the gradients of x and of the weights; `dout`, before the last ReLU, may become x's."""
    dconv2_out = _relu_gradient_(_input_gradient(dout, weight[2]), conv2_out)
    sides = [stride] * 2, [dilation] * 2, [dilation] * 2
    dconv1_out, dweight2, _ = torch.ops.aten.convolution_backward(
        dconv2_out, conv1_out, weight[1], None, *sides, False, [0, 0], 1, [True, True, False]
    )
    dconv1_out = _relu_gradient_(dconv1_out, conv1_out)
    dweight3 = pointwise_weight_gradient(dout, conv2_out, weight[2])
    dweights = [pointwise_weight_gradient(dconv1_out, x, weight[0]), dweight2, dweight3]
    if len(weight) == 4:
        dweights.append(pointwise_weight_gradient(dout, x, weight[3], stride))
    if not wants_x:
        return None, dweights
    if len(weight) == 4:
        dx = _input_gradient(dconv1_out, weight[0])
        dx[:, :, ::stride, ::stride].add_(_input_gradient(dout, weight[3]))
    else:
        dx = dout
        torch.addmm(as_rows(dx), as_rows(dconv1_out), weight[0].flatten(1), out=as_rows(dx))
    return dx, dweights


def _autograd(ctx: Any, douts: list[Tensor | None]) -> tuple[Any, ...]:
    """Compute the gradients of x and of the weights; the biases are a frozen norm's, and have none."""
    x, *rest = ctx.saved_tensors
    results, weights = rest[: ctx.results], blocks_of(rest[ctx.results :])
    outs, conv1_outs, conv2_outs = results[::3], results[1::3], results[2::3]
    dweights: list[Tensor] = []
    dx: Tensor | None = douts[-3]
    for block in reversed(range(len(outs))):
        assert dx is not None
        if block == len(outs) - 1:  # what arrives may be others' too
            dout = torch.ops.aten.threshold_backward(channels_last(dx), outs[block], 0)
        else:
            dout = _relu_gradient_(dx, outs[block])
        seen, stride, wants_x = (outs[block - 1], 1, True) if block else (x, ctx.stride, ctx.needs_input_grad[0])
        saved = seen, conv1_outs[block], conv2_outs[block], weights[block]
        dx, of_block = _block_backward(dout, *saved, stride, ctx.dilations[block], wants_x)
        dweights = of_block + dweights
    return dx, dweights, [None] * len(dweights), None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def _flop(x: Shape, weights: Sequence[Shape], biases: Any, stride: int, dilations: Any, save: bool, **_: Any) -> int:
    images, _channels, height, width = x
    before, after = images * height * width, images * -(-height // stride) * -(-width // stride)
    first = (before, after, after, after)
    pixels = (*first, *[after] * (len(weights) - len(first)))
    return sum(2 * each * math.prod(weight) for each, weight in zip(pixels, weights, strict=True))


OPERATION = Operation(
    "residual_stage",
    (
        Backend("onednn", why_not_onednn_here, reason="a whole stage in one operator, whose GEMMs add what is added"),
        Backend("ref"),
    ),
    flop={"residual_stage": _flop},
)


def residual_stage(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int,
    dilations: Sequence[int],
    backend: str = "auto",
) -> Tensor:
    """Compute a stage of bottleneck blocks, as many as `dilations`: x (B, C, H, W) -> (B, N, H', W').

    `weights` and `biases` are the first block's conv1 (M, C, 1, 1), conv2 (M, M, 3, 3), which has the stride and the
    block's dilation, conv3 (N, M, 1, 1), and the shortcut's convolution (N, C, 1, 1), with the stride; then the same
    three of each further block, where x is the shortcut. Batch norm is folded into them. x and weights are in one
    dtype, biases may be float32. onednn, on a CPU, returns channels-last memory and gives biases no gradient. Raises
    ValueError for dtypes and counts that do not fit and RuntimeError where what is asked for cannot run.
    """
    chosen = OPERATION.choose(Facts(x.device, x.dtype), backend).backend
    if any(weight.dtype != x.dtype for weight in weights):
        raise ValueError(f"x and weights must have one dtype; got {[each.dtype for each in (x, *weights)]}")
    if not len(weights) == len(biases) == 1 + 3 * len(dilations):
        count = 1 + 3 * len(dilations)
        raise ValueError(f"{len(dilations)} blocks have {count} weights and biases, not {len(weights)}")
    if chosen == "ref":
        return residual_stage_ref(x, weights, biases, stride, dilations)
    save = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *weights))
    results = forward_op(x, weights, biases, stride, dilations, save)
    return results[-3] if save else results[0]
