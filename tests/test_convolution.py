"""The 1x1 convolution with its epilogue: as exact as eager code, with only the gradients that are wanted."""

from typing import Any

import pytest
import torch
from detr_kernels import conv1x1_bias_act, conv1x1_bias_act_ref
from detr_kernels.convolution import pointwise, pointwise_backward
from detr_kernels.convolution import tiles as convolution_tiles
from detr_kernels.convolution.tiles import Blocks, choose_blocks
from detr_profiling.comparison.closeness import assert_close, assert_same_function
from torch import Tensor
from torch.nn import functional as F

from tests.kernel_inputs import DEVICE, TOLERANCES, convolution_inputs

pytestmark = pytest.mark.usefixtures("poisoned")


# (images, inputs, height, width, outputs), stride, with residual, with ReLU
CASES = [
    ((2, 64, 9, 7, 72), 1, True, True),  # a block that the outputs do not fill; the last layer of a bottleneck
    ((1, 200, 7, 5, 150), 1, False, True),  # several steps over inputs, and over outputs backwards; a ragged last one
    ((1, 3, 13, 11, 72), 1, True, False),  # several tiles of rows by two, none filled; 3 inputs, as images have
    ((1, 40, 1, 3, 16), 1, False, True),  # fewer pixels than a block has rows
    ((2, 72, 9, 7, 48), 2, False, False),  # a shortcut of stride 2, odd sides
    ((2, 48, 6, 8, 72), 2, False, True),  # even sides: the last row and column are seen by none
    ((1, 16, 5, 8, 33), 2, True, True),  # one odd, one even side, and rows of outputs that are not aligned
]


def make_inputs(
    shape: tuple[int, ...], stride: int, residual: bool, dtype: torch.dtype, integers: bool = True
) -> list[Any]:
    """x, weight, bias and residual."""
    return convolution_inputs(shape, 1, stride, 0, 1, residual, dtype, integers)[:4]


def fused(*inputs: Tensor | None, **options: object) -> Tensor:
    return conv1x1_bias_act(*inputs, **options)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "stride", "residual", "relu"), CASES)
def test_as_exact_as_eager(shape: tuple[int, ...], stride: int, residual: bool, relu: bool, dtype: torch.dtype) -> None:
    inputs = [*make_inputs(shape, stride, residual, dtype), stride, relu]
    assert torch.equal(fused(*inputs), conv1x1_bias_act_ref(*inputs))
    assert fused(*inputs).is_contiguous(memory_format=torch.channels_last)
    assert_same_function(fused, conv1x1_bias_act_ref, inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_random_values(dtype: torch.dtype) -> None:
    """The output with a ReLU; the gradients without, since near 0 the rounding of fused and eager code may disagree."""
    inputs = make_inputs((2, 200, 9, 7, 72), 1, True, dtype, integers=False)
    oracle = conv1x1_bias_act_ref(*(each.double() for each in inputs))
    floor = TOLERANCES[dtype] * oracle.abs().max().item()
    assert_close(fused(*inputs), oracle, conv1x1_bias_act_ref(*inputs), floor)
    assert_same_function(fused, conv1x1_bias_act_ref, [*inputs, 1, False], TOLERANCES[dtype])


def test_other_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep would set: groups of tiles, the last smaller; parts of several steps, the last with fewer."""
    inputs = make_inputs((1, 40, 14, 15, 48), 1, False, torch.float32)
    blocks = {
        (210, 48, 40): Blocks(32, 16, 16, 4, 2, group=2),
        (210, 40, 48): Blocks(16, 32, 32, 4, 2, group=1),
        (40, 48, 210): Blocks(32, 32, 16, 4, 2, splits=5, group=3),
    }
    for module in (pointwise, pointwise_backward):
        monkeypatch.setattr(module, "choose_blocks", lambda *size_and_dtype, **_: blocks[size_and_dtype[:3]])
    assert_same_function(fused, conv1x1_bias_act_ref, inputs, TOLERANCES[torch.float32])


def test_blocks_of_detrs_layers_fit_the_device() -> None:
    """Tiles that tensor cores take, shared memory that an A100 has, and enough programs to fill an H100."""
    for outputs, inputs, pixels in ((256, 64, 854400), (128, 256, 854400), (256, 1024, 53600), (2048, 512, 13600)):
        for blocks in (
            choose_blocks(pixels, outputs, inputs, torch.bfloat16),
            choose_blocks(inputs, outputs, pixels, torch.bfloat16, masked=True, split=True),
        ):
            assert min(blocks.rows, blocks.columns, blocks.inner) >= 16
            assert 2 * blocks.num_stages * blocks.inner * (blocks.rows + blocks.columns) <= 163 * 1024
        tiles = -(-inputs // blocks.rows) * -(-outputs // blocks.columns)
        assert 132 <= tiles * blocks.splits <= convolution_tiles.PROGRAMS


def test_a_float32_bias_is_added_in_float32() -> None:
    x, weight = (torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16, device=DEVICE) for value in (-1.0, 1.0))
    bias = torch.full((1,), 1 + 2.0**-9, device=DEVICE)
    assert fused(x, weight, bias).item() == 2.0**-9


def test_a_float32_bias_has_a_float32_gradient() -> None:
    x, weight, bias, residual = make_inputs((2, 64, 9, 7, 72), 1, True, torch.bfloat16)
    assert_same_function(fused, conv1x1_bias_act_ref, [x, weight, bias.float(), residual], TOLERANCES[torch.bfloat16])


def test_no_images() -> None:
    inputs = [
        each[:0] if each.ndim == 4 and each.shape[2] > 1 else each
        for each in make_inputs((1, 8, 2, 3, 5), 1, True, torch.float32)
    ]
    assert fused(*inputs).shape == (0, 5, 2, 3)
    assert_same_function(fused, conv1x1_bias_act_ref, inputs, 1e-6)


def test_a_nan_is_not_hidden_by_the_relu() -> None:
    inputs = make_inputs((1, 8, 2, 3, 5), 1, False, torch.float32)
    inputs[0][0, 0, 1, 1] = float("nan")
    leaf = inputs[0].requires_grad_()
    results = [function(*inputs) for function in (fused, conv1x1_bias_act_ref)]
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert results[0].isnan().sum() == 5
    grads = [torch.autograd.grad(each.sum(), leaf)[0] for each in results]
    assert torch.equal(*grads)


WANTED = [("x",), ("weight",), ("bias",), ("residual",), ("x", "bias"), ("weight", "bias"), ("x", "weight")]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_only_gradients_that_are_wanted(wanted: tuple[str, ...], relu: bool) -> None:
    """Frozen layers, and the first one that learns: each gradient by itself, and no tensor kept without need."""
    inputs = dict(
        zip(("x", "weight", "bias", "residual"), make_inputs((1, 16, 5, 4, 24), 1, True, torch.float32), strict=True)
    )
    leaves = [inputs[name].requires_grad_() for name in wanted]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        result = fused(**inputs, relu=relu)
    kept = {tuple(each.shape) for each in saved}
    needs = {"weight": inputs["x"], "x": inputs["weight"]}
    expected = [needs[name] for name in wanted if name in needs] + ([result] if relu else [])
    assert kept == {tuple(each.shape) for each in expected}
    weighting = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    plain = conv1x1_bias_act_ref(**inputs, relu=relu)
    grads = [torch.autograd.grad((each * weighting).sum(), leaves) for each in (result, plain)]
    for got, exact in zip(*grads, strict=True):
        torch.testing.assert_close(got, exact, atol=2e-5, rtol=1e-5)


def test_nothing_is_kept_without_gradients() -> None:
    inputs = make_inputs((1, 16, 5, 4, 24), 1, True, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("kept a tensor"), lambda each: each):
        assert not fused(*inputs).requires_grad


def test_the_gradient_is_the_same_each_time() -> None:
    x, weight, bias, _ = make_inputs((1, 16, 13, 14, 24), 1, False, torch.float32, integers=False)
    weight.requires_grad_()
    once, again = (torch.autograd.grad(fused(x, weight, bias).square().sum(), weight)[0] for _ in range(2))
    assert torch.equal(once, again)


def conv2d_under_autocast(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        return (F.conv2d(x, weight, bias) + residual.bfloat16()).relu()


def fused_under_autocast(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        return fused(x, weight, bias, residual)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_it_does_for_conv2d(compiled: bool) -> None:
    function = fused_under_autocast
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [each.requires_grad_() for each in make_inputs((1, 16, 5, 4, 24), 1, True, torch.float32)]
    results = [each(*inputs) for each in (function, conv2d_under_autocast)]
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)
    grads = [torch.autograd.grad(each.sum(), inputs) for each in results]
    for got, exact in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, atol=0, rtol=8e-3)  # rounded to bfloat16 by both


def test_autocast_leaves_float64_alone() -> None:
    inputs = [each.double() for each in make_inputs((1, 16, 5, 4, 24), 1, True, torch.float32)]
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match="float64"):
        fused(*inputs)  # cast, it would have run


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, residual = make_inputs((1, 16, 5, 4, 24), 1, True, torch.float32)
    for wrong in (
        (x[:, 1:], weight, bias),
        (x, weight, bias[1:]),
        (x, weight, bias, residual[..., 1:]),
        (x[0], weight, bias),
    ):
        with pytest.raises(ValueError, match=r"got \[\("):
            fused(*wrong)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        fused(x.bfloat16(), weight, bias)
    with pytest.raises(ValueError, match="stride 1 or 2"):
        fused(x, weight, bias, stride=3)
    with pytest.raises(ValueError, match=r"\(24, 16, 3, 3\)"):
        fused(x, weight.expand(-1, -1, 3, 3), bias)


@pytest.mark.parametrize(("stride", "residual", "relu"), [(1, True, True), (2, False, False)])
def test_operators_are_registered_as_torch_asks(stride: int, residual: bool, relu: bool) -> None:
    from detr_kernels.convolution.pointwise import forward_op
    from detr_kernels.convolution.pointwise_backward import input_gradient_op, weight_gradient_op

    inputs = make_inputs((1, 16, 5, 4, 24), stride, residual, torch.float32)
    x, weight, *_ = inputs
    y = fused(*inputs, stride=stride, relu=relu)
    out = y if relu else None
    torch.library.opcheck(
        forward_op, (*(each if each is None else each.requires_grad_() for each in inputs), stride, relu)
    )
    torch.library.opcheck(input_gradient_op, (y, out, weight.detach(), 5, 4, stride))
    for with_bias in (True, False):
        torch.library.opcheck(weight_gradient_op, (y, out, x.detach(), stride, with_bias))
