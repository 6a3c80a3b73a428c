"""The one judge of closeness: of tests, of the benchmark's gate and of the parity report.

A tolerance is derived, not picked: a result may err, against an oracle in higher precision, at most twice as much as
plain eager code errs in the same precision, plus a stated floor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Closeness:
    """The largest absolute error of a result, the error of plain eager code, and what was allowed."""

    error: float
    eager_error: float
    allowed: float
    close: bool
    message: str

    def __bool__(self) -> bool:
        return self.close


def largest_error(value: Tensor, oracle: Tensor) -> float:
    """Largest |value - oracle|, compared in float64; NaN where any entry of `value` is NaN or infinite."""
    if value.shape != oracle.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(oracle.shape)}")
    if not value.isfinite().all():
        return float("nan")
    if value.numel() == 0:
        return 0.0
    return (value.detach().double() - oracle.detach().double().to(value.device)).abs().max().item()


def closeness(result: Tensor, oracle: Tensor, eager: Tensor, floor: float, name: str = "result") -> Closeness:
    """Judges `result` by `oracle`, the same in float64 (or float32), and `eager`, the plain code in the result's dtype.

    All of one shape. `floor`, in the values' own unit, is what any two orders of summation may differ by; it decides
    alone where eager happens to be exact. A NaN or an infinity in the result or in the oracle is never close.
    Raises ValueError where shapes differ.
    """
    error, eager_error = largest_error(result, oracle), largest_error(eager, oracle)
    allowed = FACTOR * eager_error + floor
    close = bool(oracle.isfinite().all()) and error <= allowed  # false for NaN on either side
    verdict = "close" if close else "NOT close"
    message = f"{name}: {verdict}, error {error:.3g}, allowed {allowed:.3g} = {FACTOR:g} x {eager_error:.3g} (eager) + "
    return Closeness(error, eager_error, allowed, close, f"{message}{floor:.3g} (floor)")


def assert_close(result: Tensor, oracle: Tensor, eager: Tensor, floor: float, name: str = "result") -> Closeness:
    """`closeness`, with AssertionError where it is not; returned for reports."""
    judged = closeness(result, oracle, eager, floor, name)
    if not judged:
        raise AssertionError(judged.message)
    return judged


def relative_floor(oracle: Tensor, factor: float = 1e-6) -> float:
    """A floor for `closeness`: `factor` times the largest magnitude in `oracle`."""
    return factor * oracle.detach().abs().max().item() if oracle.numel() else factor


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """What `function(*inputs)` returns, its non-empty tensors, and the gradients of every floating input.

    The gradients are those of a random weighting of the outputs, the same for every dtype.
    """
    leaves = [
        each.detach().requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in inputs
    ]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    generator = torch.Generator().manual_seed(0)
    weightings = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    differentiable = [pair for pair in zip(outputs, weightings, strict=True) if pair[0].requires_grad]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not differentiable or not wanted:
        return outputs
    total = sum(((output * weighting).sum() for output, weighting in differentiable), outputs[0].new_zeros(()))
    return [*outputs, *torch.autograd.grad(total, wanted, materialize_grads=True)]


def in_dtype(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """`inputs` with every floating tensor in `dtype`."""
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def assert_same_function(
    fused: Callable[..., Any], eager: Callable[..., Any], inputs: Sequence[Any], floor: float, factor: float = 1.0
) -> list[Closeness]:
    """`fused` against `eager` on the same `inputs`: outputs and the gradient of every floating input.

    Judged by `eager` in float64. The floor of each value is `floor` times its largest magnitude, or times `factor`
    where that is larger: gradients that cancel to nothing still carry their summands' rounding.
    """
    results = outputs_and_gradients(fused, inputs)
    plain = outputs_and_gradients(eager, inputs)
    oracle = outputs_and_gradients(eager, in_dtype(inputs, torch.float64))
    judged = []
    for index, (result, exact, rough) in enumerate(zip(results, oracle, plain, strict=True)):
        if not result.is_floating_point():
            continue
        if result.dtype != rough.dtype:
            raise AssertionError(f"value {index} is {result.dtype}, eager's {rough.dtype}")
        scale = max(factor, exact.detach().abs().max().item() if exact.numel() else 0.0)
        judged.append(assert_close(result, exact, rough, floor * scale, name=f"value {index}"))
    return judged
