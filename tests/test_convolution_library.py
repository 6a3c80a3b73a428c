"""The library's fused convolution, cuDNN's on a GPU and oneDNN's on a CPU: as exact as eager code, in both passes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from detr_kernels import Choice, OneDNNConvolution, Operation, conv_bias_act, conv_bias_act_ref
from detr_kernels.convolution.library import library_op, why_not_onednn
from detr_profiling.comparison.closeness import assert_close, assert_same_function
from torch import Tensor

from tests.kernel_inputs import DEVICE, TOLERANCES, TWO_DTYPES, convolution_inputs

# (images, inputs, height, width, outputs), kernel, stride, padding, dilation, with residual
CASES = [
    ((2, 3, 13, 10, 64), 7, 2, 3, 1, False),  # the stem
    ((2, 16, 9, 7, 72), 1, 1, 0, 1, True),  # a bottleneck's end
    ((2, 16, 9, 7, 72), 3, 1, 1, 1, False),  # its middle
    ((1, 16, 9, 8, 48), 1, 2, 0, 1, False),  # a shortcut
    ((1, 8, 9, 7, 33), 3, 1, 2, 2, True),  # DC5's dilation
]
Case = tuple[tuple[int, ...], int, int, int, int, bool]
Function = Callable[..., Tensor]


@pytest.fixture(params=["cudnn"] if DEVICE == "cuda" else ["cudnn", "onednn"])
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """On a CPU, cuDNN's two fused operators by their own signatures, computed by plain torch."""
    if DEVICE == "cuda" or request.param == "onednn":
        yield request.param
        return
    stand_ins = torch.library.Library("aten", "IMPL")
    convolve = torch.ops.aten.convolution

    def conv_relu(x, weight, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        return convolve(x, weight, bias, stride, padding, dilation, False, [0, 0], groups).relu()

    def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        return (convolve(x, weight, bias, stride, padding, dilation, False, [0, 0], groups) + alpha * z).relu()

    stand_ins.impl("cudnn_convolution_relu", conv_relu, "CPU")
    stand_ins.impl("cudnn_convolution_add_relu", conv_add_relu, "CPU")
    yield request.param
    stand_ins._destroy()


def run_by(library: str) -> Function:
    def run(*inputs: Any, relu: bool = True) -> Tensor:
        return library_op(*inputs, relu, library)

    return run


def make_inputs(case: Case, dtype: torch.dtype, integers: bool = True) -> list[Any]:
    return convolution_inputs(*case, dtype, integers)


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_eager(case: Case, dtype: torch.dtype, library: str) -> None:
    inputs, run = make_inputs(case, dtype), run_by(library)
    assert torch.equal(run(*inputs), conv_bias_act_ref(*inputs))
    assert run(*inputs).is_contiguous(memory_format=torch.channels_last)
    assert_same_function(run, conv_bias_act_ref, inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_random_values(case: Case, dtype: torch.dtype, library: str) -> None:
    inputs, run = make_inputs(case, dtype, integers=False), run_by(library)
    oracle = conv_bias_act_ref(*(each.double() if isinstance(each, Tensor) else each for each in inputs))
    assert_close(run(*inputs), oracle, conv_bias_act_ref(*inputs), TOLERANCES[dtype] * oracle.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_onednn_leaves_the_relu_out_where_none_is_asked_for(case: Case) -> None:
    if DEVICE == "cuda":
        pytest.skip("oneDNN runs on the CPU")
    inputs = make_inputs(case, torch.float32)
    result = run_by("onednn")(*inputs, relu=False)
    assert torch.equal(result, conv_bias_act_ref(*inputs, relu=False)) and (result < 0).any()
    without = lambda *inputs: run_by("onednn")(*inputs, relu=False)  # noqa: E731
    assert_same_function(without, lambda *inputs: conv_bias_act_ref(*inputs, relu=False), inputs, 2e-6)


def test_a_float32_bias_and_frozen_weights(library: str) -> None:
    x, weight, bias, *rest = make_inputs(CASES[2], torch.bfloat16)
    run = run_by(library)
    assert_same_function(run, conv_bias_act_ref, [x, weight, bias.float(), *rest], TOLERANCES[torch.bfloat16])
    x.requires_grad_()
    grads = [torch.autograd.grad(each(x, weight, bias, *rest).sum(), x)[0] for each in (run, conv_bias_act_ref)]
    assert torch.equal(*grads)


def test_no_input_is_changed(library: str) -> None:
    inputs = make_inputs(CASES[1], torch.float32)
    before = [each.clone() for each in inputs[:4]]
    run_by(library)(*inputs)
    assert all(map(torch.equal, inputs[:4], before))


def test_under_autocast(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operation, "choose", lambda *_: Choice(library, ""))  # on a CPU too
    with torch.autocast(DEVICE, torch.bfloat16):
        result = conv_bias_act(*make_inputs(CASES[1], torch.float32))
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, conv_bias_act_ref(*make_inputs(CASES[1], torch.bfloat16)))
        without_relu = conv_bias_act(*make_inputs(CASES[1], torch.float32), relu=False)
    assert (without_relu < 0).any()


@pytest.mark.skipif(DEVICE == "cuda", reason="oneDNN runs on the CPU")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_packed_convolution_takes_any_size_and_writes_over_the_residual(
    case: Case, dtype: torch.dtype, relu: bool
) -> None:
    (images, inputs, height, width, outputs), *rest = case
    _, weight, bias, _, *geometry = make_inputs(case, dtype)
    packed = OneDNNConvolution(weight, bias.float(), *geometry)
    for larger in (0, 3, 1):  # the weight is packed for the first
        size = (images, inputs, height + larger, width + 2 * larger, outputs)
        x, _, _, residual, *_ = make_inputs((size, *rest), dtype)
        expected = conv_bias_act_ref(x, weight, bias, residual, *geometry, relu=relu)
        found = packed(x, residual, relu)
        assert torch.equal(found, expected)
        assert residual is None or found.data_ptr() == residual.data_ptr()


def test_a_dtype_that_onednn_lacks_takes_plain_torch() -> None:
    if DEVICE == "cuda":
        pytest.skip("of the CPU")
    assert why_not_onednn(torch.float32) is None and "float16" in str(why_not_onednn(torch.float16))
    inputs = make_inputs(CASES[1], torch.float16)
    assert torch.equal(conv_bias_act(*inputs), conv_bias_act_ref(*inputs))


def test_the_operator_is_registered_as_torch_asks(library: str) -> None:
    inputs = [
        each.requires_grad_() if isinstance(each, Tensor) else each for each in make_inputs(CASES[1], torch.float32)
    ]
    torch.library.opcheck(library_op, (*inputs, True, library))


TWICE = """
import detr_kernels, torch
weight = torch.ones(16, 16, 5, 5)
for width in [*range(1, 1101)] * 2:
    torch.nn.functional.conv2d(torch.ones(2, 16, 5, 4 + width), weight)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="oneDNN is for a CPU")
def test_onednn_forgets_no_shape_of_a_run_of_many() -> None:
    """By itself it keeps 1,024."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_create"}
    told = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, check=True)
    made, kept = (told.stdout.count(f"create:{which},cpu,convolution,") for which in ("cache_miss", "cache_hit"))
    assert made == kept == 1100
