"""Floating-point operations of an operator, by the shapes of its tensors: two for every multiply-add.

Those of matrix products and convolutions alone; what works entry by entry counts none, as in torch's own counter
(`torch.utils.flop_counter`), whose formulas these complete. Importing this file teaches them to `FlopCounterMode` too.

What a fused attention's backward pass computes for a second time is not counted: it belongs to the form, not to the
model, and with it the same model would have other numbers in other forms (the M in MFU; Chowdhery et al. 2022,
appendix B). Forward passes that activation checkpointing repeats are operators like any other, and are counted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import detr_kernels  # noqa: F401  # defines the operators
import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, shape_wrapper

aten, ours = torch.ops.aten, torch.ops.detr_kernels
Shape = Sequence[int]

WITHOUT_PRODUCTS = frozenset(
    {
        *("add_layer_norm", "add_layer_norm_backward", "bias_act", "bias_act_backward"),
        *("dropout", "dropout_backward", "relu_dropout", "relu_dropout_backward"),
        *("assignment", "assignment_scipy", "match_cost", "set_loss", "set_loss_backward", "resize_normalize_pad"),
    }
)
"""Operators of detr_kernels that multiply no matrices."""


@register_flop_formula(ours.conv1x1_bias_act)
def _conv1x1(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * weight[1]


@register_flop_formula(ours.conv1x1_input_gradient)
def _conv1x1_input_gradient(dy: Shape, out: Shape | None, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * weight[1]


@register_flop_formula(ours.conv1x1_weight_gradient)
def _conv1x1_weight_gradient(dy: Shape, out: Shape | None, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) * x[1]


@register_flop_formula(ours.conv_bias_act_library)
def _convolution(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula(ours.residual_stage)
def _residual_stage(
    x: Shape, weights: Sequence[Shape], biases: Any, stride: int, dilations: Any, kept: bool, **_: Any
) -> int:
    images, _channels, height, width = x
    before, after = images * height * width, images * -(-height // stride) * -(-width // stride)
    first = (before, after, after, after)
    pixels = (*first, *[after] * (len(weights) - len(first)))
    return sum(2 * each * math.prod(weight) for each, weight in zip(pixels, weights, strict=True))


def _onednn_convolution(*shapes: Any, out_shape: Shape, **_: Any) -> int:
    """x, weight, bias; or x and a residual, in either order, and then weight and bias."""
    weight = shapes[2] if shapes[2] is not None and len(shapes[2]) == 4 else shapes[1]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


for packet in (torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_):
    register_flop_formula(packet)(_onednn_convolution)


def packed_flop(q: Shape, q_offsets: Shape, longest_q: int, longest_k: int) -> int:
    """Of attention's two products, q (Mq, H, d), as if each of the B images had the longest one's tokens.

    How many it has is known on the device alone, and not at all without data. So this is an upper bound, and the same
    number as that of a padded batch.
    """
    images, (_, heads, width) = q_offsets[0] - 1, q
    return 2 * (2 * images * heads * longest_q * longest_k * width)


@register_flop_formula(ours.packed_attention)
def _packed_attention(q: Shape, *rest: Any, **__: Any) -> int:
    _, _, q_offsets, _, _, longest, _ = rest
    return packed_flop(q, q_offsets, *longest)


@register_flop_formula(ours.packed_attention_backward)
def _packed_attention_backward(dout: Shape, q: Shape, *rest: Any, **__: Any) -> int:
    _, _, _, _, q_offsets, _, _, longest, _ = rest
    return 2 * packed_flop(q, q_offsets, *longest)


@register_flop_formula(ours.xformers_attention)
def _xformers_attention(q: Shape, *rest: Any, **__: Any) -> int:
    _, _, q_offsets, _, longest_q, longest_k, _ = rest
    return packed_flop(q, q_offsets, longest_q, longest_k)


@register_flop_formula(ours.xformers_attention_backward)
def _xformers_attention_backward(dout: Shape, q: Shape, *rest: Any, **__: Any) -> int:
    _, _, _, _, _, q_offsets, _, longest_q, longest_k, _ = rest
    return 2 * packed_flop(q, q_offsets, longest_q, longest_k)


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Of q (..., Nq, d) and k, v (..., Nk, d), each with a leading dimension or two."""
    return 4 * math.prod(q) * k[-2]


def _attention_backward(dout: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Each of the two products has two gradients; the scores, computed once more, are not counted."""
    return 2 * _attention(q, k, v)


for target, formula in (
    (ours.dropout_attention, _attention),
    (ours.dropout_attention_backward, _attention_backward),
    (aten._scaled_dot_product_flash_attention_for_cpu, _attention),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward),
):
    if target not in flop_registry:  # torch 2.11's lacks them
        register_flop_formula(target)(formula)


def _convolution_backward(dy: Shape, x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    """Each gradient that is asked for costs what the forward pass did.

    torch's own formula multiplies the weight's gradient by the number of groups once too often.
    """
    transposed, wanted = rest[-4], rest[-1]
    return 2 * sum(wanted[:2]) * math.prod(x if transposed else dy) * math.prod(weight[1:])


INSTEAD: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: shape_wrapper(_convolution_backward),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
    aten._scaled_dot_product_flash_attention_backward: shape_wrapper(_attention_backward),
    aten._scaled_dot_product_efficient_attention_backward: shape_wrapper(_attention_backward),
    aten._scaled_dot_product_cudnn_attention_backward: shape_wrapper(_attention_backward),
}
"""Formulas that take the place of torch's here."""


def has_products(operator: Any) -> bool:
    """Whether an operator (an OpOverload) has a formula."""
    return operator.overloadpacket in INSTEAD or operator.overloadpacket in flop_registry


def operator_flop(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Of one call, by its arguments and what it returned; 0 for an operator without products."""
    packet = operator.overloadpacket
    formula = INSTEAD.get(packet) or flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula else 0
