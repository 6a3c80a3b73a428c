"""Floating-point operations of an operator, from the shapes of its tensors: two for every multiply-add.

Matrix multiplications and convolutions alone count, as in torch's own counter (`torch.utils.flop_counter`), whose
formulas these complete. Importing this file teaches them to `FlopCounterMode` too.

What a fused attention's backward pass computes for a second time does not count: it belongs to the backend, not to the
model, which would have other numbers on other backends (the M in MFU; Chowdhery et al. 2022, appendix B). Forward
passes that activation checkpointing repeats are operators like any other, and count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detr_kernels import OPERATIONS
from detr_kernels.attention.backends import attention_backward_flop, attention_flop
from detr_kernels.registry import Shape, zero_flop
from torch.utils.flop_counter import flop_registry, register_flop_formula, shape_wrapper

aten, ours = torch.ops.aten, torch.ops.detr_kernels

for operation in OPERATIONS.values():
    for name, formula in operation.flop.items():
        if formula is not zero_flop:
            register_flop_formula(getattr(ours, name))(formula)


def _onednn_convolution(*shapes: Any, out_shape: Shape, **_: Any) -> int:
    """Count an operator of (x, weight, bias), or of x and a residual, in either order, then weight and bias."""
    weight = shapes[2] if shapes[2] is not None and len(shapes[2]) == 4 else shapes[1]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


for packet in (torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_):
    register_flop_formula(packet)(_onednn_convolution)


for target, formula in (
    (aten._scaled_dot_product_flash_attention_for_cpu, attention_flop),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward, attention_backward_flop),
):
    if target not in flop_registry:  # torch 2.11's lacks them
        register_flop_formula(target)(formula)


def _convolution_backward(dy: Shape, x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    """Count for each gradient that is asked for what the forward pass cost.

    torch's own formula multiplies the weight's gradient by the number of groups once too often.
    """
    transposed, wanted = rest[-4], rest[-1]
    return 2 * sum(wanted[:2]) * math.prod(x if transposed else dy) * math.prod(weight[1:])


INSTEAD: dict[Any, Callable[..., int]] = {
    aten.convolution_backward: shape_wrapper(_convolution_backward),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(attention_backward_flop),
    aten._scaled_dot_product_flash_attention_backward: shape_wrapper(attention_backward_flop),
    aten._scaled_dot_product_efficient_attention_backward: shape_wrapper(attention_backward_flop),
    aten._scaled_dot_product_cudnn_attention_backward: shape_wrapper(attention_backward_flop),
}
"""Formulas that take the place of torch's here."""


def has_products(operator: Any) -> bool:
    """Tell whether an operator (an OpOverload) has a formula."""
    return operator.overloadpacket in INSTEAD or operator.overloadpacket in flop_registry


def operator_flop(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Count one call, from its arguments and what it returned; 0 for an operator without a formula."""
    packet = operator.overloadpacket
    formula = INSTEAD.get(packet) or flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=result) if formula else 0
