"""Any convolution in each form: as exact as eager code, forward and backward, and chosen for a stated reason."""

from typing import Any

import pytest
import torch
from detr_kernels import conv_bias_act, conv_bias_act_ref
from detr_kernels.convolution import epilogue, pointwise
from detr_profiling.comparison.closeness import assert_close, assert_same_function
from torch import Tensor
from torch.nn import functional as F

from tests.kernel_inputs import DEVICE, TOLERANCES, convolution_inputs

pytestmark = pytest.mark.usefixtures("poisoned")


# (images, inputs, height, width, outputs), kernel, stride, padding, dilation, with residual, with ReLU
CASES = [
    ((2, 3, 13, 10, 64), 7, 2, 3, 1, False, True),  # the stem
    ((2, 16, 9, 7, 72), 3, 1, 1, 1, False, True),  # the middle of a bottleneck; a block that the channels do not fill
    ((1, 16, 9, 8, 48), 3, 2, 1, 1, True, True),  # stride 2 on one odd and one even side; a basic block's end
    ((1, 8, 9, 7, 33), 3, 1, 2, 2, True, False),  # DC5's dilation; rows that are not aligned
    ((1, 8, 3, 3, 5), 3, 1, 0, 1, False, False),  # one pixel; nothing but the bias
]


def bottleneck(dtype: torch.dtype, residual: bool = True, integers: bool = True) -> list[Any]:
    return convolution_inputs((2, 16, 9, 7, 72), 3, 1, 1, 1, residual, dtype, integers)


def tail(*inputs: Any, **options: object) -> Tensor:
    return conv_bias_act(*inputs, backend="triton", **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation", "residual", "relu"), CASES)
def test_as_exact_as_eager(
    shape: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    residual: bool,
    relu: bool,
    dtype: torch.dtype,
) -> None:
    inputs = [*convolution_inputs(shape, kernel, stride, padding, dilation, residual, dtype), relu]
    assert torch.equal(tail(*inputs), conv_bias_act_ref(*inputs))
    assert tail(*inputs).is_contiguous(memory_format=torch.channels_last)
    assert_same_function(tail, conv_bias_act_ref, inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_random_values(dtype: torch.dtype) -> None:
    """The output with a ReLU; the gradients without, since near 0 the rounding of fused and eager code may disagree."""
    inputs = bottleneck(dtype, integers=False)
    oracle = conv_bias_act_ref(*(each.double() if isinstance(each, Tensor) else each for each in inputs))
    floor = TOLERANCES[dtype] * oracle.abs().max().item()
    assert_close(tail(*inputs), oracle, conv_bias_act_ref(*inputs), floor)
    assert_same_function(tail, conv_bias_act_ref, [*inputs, False], TOLERANCES[dtype])


def test_programs_that_take_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on large images; 4 blocks of 32 pixels for 3 programs, the last block not full."""
    monkeypatch.setattr(epilogue, "PARTIAL_SUMS", 3)
    assert_same_function(tail, conv_bias_act_ref, bottleneck(torch.float32), TOLERANCES[torch.float32])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (0, 2, 3)])
def test_only_gradients_that_are_wanted(wanted: tuple[int, ...]) -> None:
    """A frozen weight, a frozen norm, the first layer that learns; only the output is kept for the tail itself."""
    inputs = bottleneck(torch.float32)
    leaves = [inputs[index].requires_grad_() for index in wanted]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        result = tail(*inputs)
    of_the_convolution = [inputs[0], inputs[1]] if {0, 1} & set(wanted) else []
    # the convolution's own output, of the same shape, is not kept: it would have negative values
    shapes = {tuple(each.shape) for each in of_the_convolution} | {tuple(result.shape)}
    assert {tuple(each.shape) for each in saved} <= shapes
    assert all((each >= 0).all() for each in saved if each.shape == result.shape)
    weighting = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    plain = conv_bias_act_ref(*inputs)
    grads = [torch.autograd.grad((each * weighting).sum(), leaves) for each in (result, plain)]
    for got, exact in zip(*grads, strict=True):
        torch.testing.assert_close(got, exact, atol=2e-5, rtol=1e-5)


def test_a_float32_bias() -> None:
    """Added in float32, and so is its gradient; eager code rounds it to x's dtype first."""
    x, weight, bias, *rest = bottleneck(torch.bfloat16)
    assert_same_function(tail, conv_bias_act_ref, [x, weight, bias.float(), *rest], TOLERANCES[torch.bfloat16])
    x, weight = (torch.full((1, 1, 3, 3), value, dtype=torch.bfloat16, device=DEVICE) for value in (-1.0, 1.0))
    bias = torch.full((1,), 9 + 2.0**-9, device=DEVICE)
    assert tail(x, weight, bias).item() == 2.0**-9


def test_no_images() -> None:
    inputs = [each[:0] if index in (0, 3) else each for index, each in enumerate(bottleneck(torch.float32))]
    assert tail(*inputs).shape == (0, 72, 9, 7)
    assert_same_function(tail, conv_bias_act_ref, inputs, 1e-6)


def test_a_nan_is_not_hidden_by_the_relu() -> None:
    x, *rest = bottleneck(torch.float32)
    x[0, 0, 4, 4] = float("nan")
    results = [function(x, *rest) for function in (tail, conv_bias_act_ref)]
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert results[0].isnan().sum() == 72 * 9


def test_operators_are_registered_as_torch_asks() -> None:
    from detr_kernels.convolution.epilogue import backward_op, forward_op

    inputs = bottleneck(torch.float32)
    _, _, bias, residual, *_ = [each.requires_grad_() if isinstance(each, Tensor) else each for each in inputs]
    conv = residual.detach().flip(0).contiguous(memory_format=torch.channels_last).requires_grad_()
    for relu in (True, False):
        torch.library.opcheck(forward_op, (conv, bias, residual, relu))
        torch.library.opcheck(forward_op, (conv, bias, None, relu))
    torch.library.opcheck(backward_op, (residual.detach(), conv.detach()))


def test_one_function_for_every_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """1x1 is one matrix product, of stride 1 or 2 and without padding; otherwise, and of float64, it is not."""
    calls = []
    inner = pointwise.forward_op
    monkeypatch.setattr(pointwise, "forward_op", lambda *a, **k: calls.append(a) or inner(*a, **k))
    for stride, padding, product in ((1, 0, True), (2, 0, True), (3, 0, False), (1, 1, False)):
        calls.clear()
        inputs = convolution_inputs((1, 8, 5, 4, 12), 1, stride, padding, 1, True, torch.float32)
        assert torch.equal(tail(*inputs), conv_bias_act_ref(*inputs))
        assert bool(calls) == product


def test_plain_torch_changes_no_input_and_keeps_float64() -> None:
    inputs = [each.double() if isinstance(each, Tensor) else each for each in bottleneck(torch.float32)]
    before = [each.clone() if isinstance(each, Tensor) else each for each in inputs]
    x, weight, bias, residual, *_ = inputs
    expected = (F.conv2d(x, weight, bias, padding=1) + residual).relu()
    assert torch.equal(conv_bias_act(*inputs), expected)
    assert all(map(torch.equal, inputs[:4], before[:4]))
    with pytest.raises(RuntimeError, match="float64"):
        tail(*inputs)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, residual, *rest = bottleneck(torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 72, 9, 6\)"):
        conv_bias_act(x, weight, bias, residual[..., 1:], *rest)
    with pytest.raises(ValueError, match=r"\(71,\)"):
        conv_bias_act(x, weight, bias[1:], residual, *rest)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        conv_bias_act(x.bfloat16(), weight, bias, residual, *rest)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_it_does_for_conv2d(compiled: bool) -> None:
    def under_autocast(*inputs: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return tail(*inputs)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *geometry: Any) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return (F.conv2d(x, weight, bias, *geometry) + residual.bfloat16()).relu()

    function = torch.compile(under_autocast, fullgraph=True, backend="aot_eager") if compiled else under_autocast
    inputs = [each.requires_grad_() if isinstance(each, Tensor) else each for each in bottleneck(torch.float32)]
    results = [each(*inputs) for each in (function, plain)]
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)
    grads = [torch.autograd.grad(each.sum(), inputs[:4]) for each in results]
    for got, exact in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, atol=0, rtol=8e-3)  # rounded to bfloat16 by both
