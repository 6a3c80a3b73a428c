"""Dropout, residual add and LayerNorm: as exact as eager code, with a mask that its backward pass draws again."""

import pytest
import torch
from detr_kernels import fused_add_layer_norm, fused_add_layer_norm_ref
from detr_profiling.comparison.closeness import assert_same_function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.kernel_inputs import DEVICE, TOLERANCES

pytestmark = pytest.mark.usefixtures("poisoned")

# DETR's tokens and queries; one row; a width that fills no block; more rows than one block, and more blocks than one
# program of the backward pass takes at a time; tiny's width
SHAPES = [(2, 100, 256), (1, 33), (3, 7, 100), (4200, 64), (5, 128)]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator) * 2 + 1 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator) + shift for shift in (1, 0))
    return [each.to(DEVICE, dtype) for each in (x, residual, weight, bias)]


def fused(*inputs: Tensor, **options: object) -> Tensor:
    return fused_add_layer_norm(*inputs, backend="triton", **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same_function(fused, fused_add_layer_norm_ref, make_inputs(shape, dtype), TOLERANCES[dtype])


def test_autocasts_mixture_of_dtypes() -> None:
    x, residual, weight, bias = make_inputs((2, 100, 256), torch.float32)
    inputs = [x.bfloat16(), residual, weight, bias]
    assert fused(*inputs).dtype == torch.float32
    assert_same_function(fused, fused_add_layer_norm_ref, inputs, TOLERANCES[torch.bfloat16])


def test_a_gpus_autocast_gives_float32_as_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, not on a CPU, autocast runs LayerNorm in float32: what follows it must not become bfloat16."""
    monkeypatch.setattr("detr_kernels.launch.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        x = torch.zeros(4, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.zeros(64, device="cuda")
        for function in (fused, fused_add_layer_norm_ref):
            assert function(x, x, weight, weight).dtype == torch.float32


def test_nothing_saved_without_gradients_changes_nothing() -> None:
    inputs = make_inputs((2, 100, 256), torch.bfloat16)
    with torch.no_grad():
        plain = fused(*inputs)
    assert torch.equal(plain, fused(*(each.requires_grad_() for each in inputs)))


def test_no_rows() -> None:
    assert_same_function(fused, fused_add_layer_norm_ref, make_inputs((2, 0, 64), torch.float32), 1e-6)


def test_dropouts_mask_is_the_same_in_both_passes() -> None:
    p, (x, residual, weight, bias) = 0.3, make_inputs((40, 64), torch.float32)
    x.requires_grad_()
    torch.manual_seed(7)
    y = fused(x, residual, weight, bias, dropout=p, training=True)
    torch.manual_seed(7)
    zeros, ones, unit = torch.zeros_like(residual), torch.full_like(residual, 5.0), torch.ones_like(weight)
    # a row of fives that are dropped or not has two values after the norm: which one says what was dropped
    mask = fused(ones, zeros, unit, torch.zeros_like(bias), dropout=p, training=True) > 0
    assert mask.float().mean().item() == pytest.approx(1 - p, abs=0.05)
    dropped = torch.where(mask, x / (1 - p), 0)
    expected = F.layer_norm(residual + dropped, (64,), weight, bias)
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-6)
    weighting = torch.randn_like(y)
    grads = [torch.autograd.grad((each * weighting).sum(), x)[0] for each in (y, expected)]
    torch.testing.assert_close(*grads, atol=5e-6, rtol=1e-5)
    assert (grads[0][~mask] == 0).all()


def test_dropout_draws_anew_each_time_and_only_in_training() -> None:
    inputs = make_inputs((10, 64), torch.float32)
    once, again = (fused(*inputs, dropout=0.5, training=True) for _ in range(2))
    assert not torch.equal(once, again)
    assert torch.equal(fused(*inputs, dropout=0.5), fused(*inputs))


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, residual, weight, bias = make_inputs((4, 64), torch.float32)
    with pytest.raises(ValueError, match=r"\(4, 63\)"):
        fused(x[:, :63], residual, weight, bias)
