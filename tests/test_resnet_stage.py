"""A ResNet's stage on a CPU in one operator: as exact as eager code, in both passes, and the backbone runs it."""

from collections.abc import Callable

import pytest
import torch
from detr_kernels import Selection, residual_stage, residual_stage_ref, why_not_onednn
from detr_kernels.convolution.stage import forward_op
from detr_profiling.comparison.closeness import assert_same_function
from torch import Tensor

from detr_fast.model.backbone import ResNet
from detr_fast.model.backends import hand_out
from detr_fast.runtime import multiplies_bf16
from tests.kernel_inputs import TOLERANCES, TWO_DTYPES

CPU = torch.device("cpu")
# stride, and the blocks' dilations
CASES = {"two": (2, [1, 1]), "one": (2, [1]), "layer1": (1, [1, 1, 1]), "dilated": (1, [1, 2])}
INPUTS, WIDTH, OUTPUTS = 32, 16, 64


def make_inputs(case: str, dtype: torch.dtype) -> list[Tensor]:
    """x, four weights and three for each further block, as many biases. Integers, few of a weight's not 0: every sum of
    the forward pass is exact in every dtype, and so no rounding decides at which side of a ReLU a value lies."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, kept: float = 1.0) -> Tensor:
        kept_ones = torch.rand(size, generator=generator) < kept
        return (torch.randint(-1, 2, size, generator=generator) * kept_ones).to(dtype)

    x = draw(2, INPUTS, 9, 7).contiguous(memory_format=torch.channels_last)
    weights = []
    for block in range(len(CASES[case][1])):
        weights += [
            draw(WIDTH, OUTPUTS if block else INPUTS, 1, 1, kept=0.1),
            draw(WIDTH, WIDTH, 3, 3, kept=0.03),
            draw(OUTPUTS, WIDTH, 1, 1, kept=0.2),
        ]
        weights += [] if block else [draw(OUTPUTS, INPUTS, 1, 1, kept=0.2)]
    return [x, *weights, *(draw(len(weight)) for weight in weights)]


def run(function: Callable[..., Tensor], case: str) -> Callable[..., Tensor]:
    """Of x and weights, with biases that have no gradient."""

    def of_inputs(x: Tensor, *rest: Tensor) -> Tensor:
        half = len(rest) // 2
        return function(x, list(rest[:half]), [bias.detach() for bias in rest[half:]], *CASES[case])

    return of_inputs


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_eager(case: str, dtype: torch.dtype) -> None:
    if why_not_onednn(dtype):
        pytest.skip(str(why_not_onednn(dtype)))
    inputs = make_inputs(case, dtype)
    found, expected = run(residual_stage, case)(*inputs), run(residual_stage_ref, case)(*inputs)
    assert torch.equal(found, expected) and expected.std() > 0
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_same_function(run(residual_stage, case), run(residual_stage_ref, case), inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES)
def test_what_others_hold_is_not_changed(case: str) -> None:
    """Neither the inputs nor the gradient that arrives, which other blocks may share."""
    inputs = [each.requires_grad_() for each in make_inputs(case, torch.float32)]
    before = [each.detach().clone() for each in inputs]
    out = run(residual_stage, case)(*inputs)
    kept, arriving = out.detach().clone(), torch.randn_like(out)
    arrived = arriving.clone()
    out.backward(arriving)
    assert torch.equal(arriving, arrived) and torch.equal(out, kept)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("case", CASES)
def test_without_gradients_it_is_the_same_and_keeps_nothing(case: str) -> None:
    x, *rest = make_inputs(case, torch.float32)
    half = len(rest) // 2
    weights, biases = rest[:half], rest[half:]
    before = x.clone()
    found = residual_stage(x, weights, biases, *CASES[case])
    assert torch.equal(found, residual_stage_ref(x, weights, biases, *CASES[case])) and torch.equal(x, before)
    assert len(forward_op(x, weights, biases, *CASES[case], False)) == 1


def test_an_image_that_needs_no_gradient_gets_none() -> None:
    x, *rest = make_inputs("two", torch.float32)
    weights = [each.requires_grad_() for each in rest[:7]]
    grads = [
        torch.autograd.grad(form(x, weights, rest[7:], *CASES["two"]).sum(), weights)
        for form in (residual_stage, residual_stage_ref)
    ]
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain)


def test_memory_of_any_order_is_taken() -> None:
    inputs, stage = make_inputs("layer1", torch.float32), run(residual_stage, "layer1")
    found = stage(*(each.contiguous() for each in inputs))
    assert torch.equal(found, stage(*inputs)) and found.is_contiguous(memory_format=torch.channels_last)


def test_what_it_cannot_compute_is_refused() -> None:
    x, *rest = make_inputs("one", torch.float16)
    weights, biases = rest[:4], rest[4:]
    with pytest.raises(RuntimeError, match=r"residual stage by onednn: .*float16"):
        residual_stage(x, weights, biases, 1, [1], "onednn")
    with pytest.raises(ValueError, match="one dtype"):
        residual_stage(x.float(), weights, biases, 1, [1])
    with pytest.raises(RuntimeError, match="not on meta"):
        residual_stage(x.to("meta"), weights, biases, 1, [1], "onednn")
    with pytest.raises(ValueError, match="2 blocks have 7 weights and biases, not 4"):
        residual_stage(x.float(), [each.float() for each in weights], biases, 1, [1, 1])


def test_what_keeps_nothing_is_registered_as_torch_asks_too() -> None:
    x, *rest = make_inputs("dilated", torch.float32)
    half = len(rest) // 2
    torch.library.opcheck(forward_op, (x, rest[:half], rest[half:], *CASES["dilated"], False))


@pytest.mark.parametrize("dilation", [False, True])
def test_the_backbone_runs_it_and_is_the_same(dilation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = ResNet((2, 1, 1, 2), dilation)
    images = torch.randn(2, 3, 65, 97)
    calls = []

    def counted(*args: object) -> Tensor:
        calls.append(args)
        return residual_stage(*args)

    monkeypatch.setattr("detr_fast.model.backbone.residual_stage", counted)
    parameters = [each for each in backbone.parameters() if each.requires_grad]
    found = [backbone(images)]
    found += torch.autograd.grad(found[0].square().mean(), parameters)
    assert len(calls) == 4
    hand_out(Selection.named(residual_stage="ref", convolution="ref"), backbone)
    plain = [backbone(images)]
    plain += torch.autograd.grad(plain[0].square().mean(), parameters)
    assert len(calls) == 4
    for mine, other in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_under_autocast_it_computes_in_autocasts_dtype() -> None:
    if not multiplies_bf16(CPU):
        pytest.skip("this processor has no bf16")
    torch.manual_seed(0)
    backbone = ResNet((1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone(torch.randn(1, 3, 64, 64)).dtype == torch.bfloat16
