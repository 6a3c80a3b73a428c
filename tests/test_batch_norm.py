"""Frozen batch norm folds exactly into the convolution before it, for values and for the weight's gradient."""

import pytest
import torch
from detr_kernels import fold_frozen_bn
from torch import Tensor
from torch.nn import functional as F


def make_norm(channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """gamma, beta, mean and a variance that comes near eps, as trained networks have them."""
    generator = torch.Generator().manual_seed(0)
    gamma, beta, mean = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(3))
    var = torch.rand(channels, generator=generator, dtype=torch.float64) + 1e-4
    return [each.to(dtype) for each in (gamma, beta, mean, var)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_same_function_and_gradient(kernel: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 8, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 5, kernel, kernel, generator=generator, dtype=torch.float64, requires_grad=True)
    gamma, beta, mean, var = make_norm(6)
    folded = F.conv2d(x, *fold_frozen_bn(weight, gamma, beta, mean, var, eps=1e-3))
    plain = F.batch_norm(F.conv2d(x, weight), mean, var, gamma, beta, eps=1e-3)
    torch.testing.assert_close(folded, plain, atol=1e-12, rtol=1e-12)
    weighting = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad((each * weighting).sum(), weight)[0] for each in (folded, plain)]
    torch.testing.assert_close(*grads, atol=1e-11, rtol=1e-12)  # sums of 112 products of size 10


def test_rounding_the_weight_is_one_pass_with_the_same_gradient() -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    norm = make_norm(6, torch.float32)
    rounded, shift = fold_frozen_bn(weight, *norm, rounded_to=torch.bfloat16)
    folded, same_shift = fold_frozen_bn(weight, *norm)
    assert torch.equal(rounded, folded.bfloat16()) and torch.equal(shift, same_shift)
    dy = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(2)).bfloat16()
    grads = [torch.autograd.grad(each, weight, dy.to(each.dtype))[0] for each in (rounded, folded)]
    assert grads[0].dtype == torch.float32 and torch.equal(*grads)


def test_only_the_weight_learns() -> None:
    weight = torch.ones(6, 5, 1, 1, requires_grad=True)
    norm = [each.requires_grad_() for each in make_norm(6, torch.float32)]
    folded, bias = fold_frozen_bn(weight, *norm)
    assert not bias.requires_grad
    folded.sum().backward()
    assert all(each.grad is None for each in norm)
    scale = norm[0] * (norm[3] + 1e-5).rsqrt()
    torch.testing.assert_close(weight.grad, scale.detach()[:, None, None, None].expand_as(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_is_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [torch.full((6, 5, 1, 1), 1.1, dtype=dtype), *make_norm(6, dtype)]
    with torch.autocast("cpu", torch.bfloat16):
        result = fold_frozen_bn(*inputs)
    expected = fold_frozen_bn(*(each.to(wide) for each in inputs))
    assert [each.dtype for each in result] == [wide, wide]
    assert all(map(torch.equal, result, expected))


def test_shapes_that_do_not_fit_are_refused() -> None:
    gamma, beta, mean, var = make_norm(6)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        fold_frozen_bn(torch.ones(6, 5, 1, 1), gamma, beta, mean[:5], var)


def test_compiles_without_a_graph_break() -> None:
    inputs = [torch.ones(6, 5, 1, 1), *make_norm(6, torch.float32)]
    compiled = torch.compile(fold_frozen_bn, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*inputs), fold_frozen_bn(*inputs)))
