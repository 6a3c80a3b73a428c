"""The one judge of closeness: of tests, of the benchmark's gate and of the parity report.

A tolerance is derived, not picked: against the exact result, in float64, a result may err
at most twice as much as plain eager code errs in the result's own precision, plus a stated absolute tolerance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Closeness:
    """Holds the largest absolute error of a result, that of plain eager code, and what was allowed."""

    error: float
    eager_error: float
    allowed: float
    close: bool
    message: str

    def __bool__(self) -> bool:
        return self.close


def largest_error(value: Tensor, exact: Tensor) -> float:
    """Return the largest |value - exact|, in float64; NaN where any entry of `value` is NaN or infinite."""
    if value.shape != exact.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(exact.shape)}")
    if not value.isfinite().all():
        return float("nan")
    if value.numel() == 0:
        return 0.0
    return (value.detach().double() - exact.detach().double().to(value.device)).abs().max().item()


def closeness(result: Tensor, exact: Tensor, eager: Tensor, tolerance: float, name: str = "result") -> Closeness:
    """Judge `result` by `exact`, the same in float64 (or float32), and `eager`, plain code in the result's dtype.

    All have one shape. `tolerance` is absolute, in the values' own unit: what any two orders of summation may differ
    by. It decides alone where eager happens to be exact. NaN or infinity in the result or in `exact` is never close.
    Raises ValueError where shapes differ.
    """
    error, eager_error = largest_error(result, exact), largest_error(eager, exact)
    allowed = FACTOR * eager_error + tolerance
    close = bool(exact.isfinite().all()) and error <= allowed  # false for NaN on either side
    verdict = "close" if close else "NOT close"
    message = f"{name}: {verdict}, error {error:.3g}, allowed {allowed:.3g} = {FACTOR:g} x {eager_error:.3g} (eager) + "
    return Closeness(error, eager_error, allowed, close, f"{message}{tolerance:.3g}")


def assert_close(result: Tensor, exact: Tensor, eager: Tensor, tolerance: float, name: str = "result") -> Closeness:
    """Judge as `closeness` does, and return its verdict. Raises AssertionError where that is not close."""
    judged = closeness(result, exact, eager, tolerance, name)
    if not judged:
        raise AssertionError(judged.message)
    return judged


def scaled_tolerance(exact: Tensor, factor: float = 1e-6) -> float:
    """Return `factor` times the largest magnitude in `exact`: an absolute tolerance for `closeness`."""
    return factor * exact.detach().abs().max().item() if exact.numel() else factor


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that `function(*inputs)` returns, and the gradients of every floating input.

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
    """Return `inputs` with every floating tensor in `dtype`."""
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def assert_same_function(
    fused: Callable[..., Any], eager: Callable[..., Any], inputs: Sequence[Any], tolerance: float, factor: float = 1.0
) -> list[Closeness]:
    """Compare `fused` with `eager` on the same inputs: outputs, and the gradient of every floating input.

    Both are judged by `eager` in float64. The absolute tolerance of each value is `tolerance` times its largest
    magnitude, or times `factor` where that is larger: gradients that cancel to nothing still carry their summands'
    rounding. Raises AssertionError where they are not close.
    """
    results = outputs_and_gradients(fused, inputs)
    plain = outputs_and_gradients(eager, inputs)
    in_float64 = outputs_and_gradients(eager, in_dtype(inputs, torch.float64))
    judged = []
    for index, (result, exact, rough) in enumerate(zip(results, in_float64, plain, strict=True)):
        if not result.is_floating_point():
            continue
        if result.dtype != rough.dtype:
            raise AssertionError(f"value {index} is {result.dtype}, eager's {rough.dtype}")
        scale = max(factor, exact.detach().abs().max().item() if exact.numel() else 0.0)
        judged.append(assert_close(result, exact, rough, tolerance * scale, name=f"value {index}"))
    return judged
