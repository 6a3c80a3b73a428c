"""A bottleneck block on a CPU in one operator: as exact as eager code, in both passes, and the backbone runs it."""

from collections.abc import Callable

import pytest
import torch
from detr_kernels import bottleneck, bottleneck_ref, why_not_onednn
from detr_kernels.bottleneck import forward_op
from detr_profiling.comparison.closeness import assert_same_function
from torch import Tensor

from detr_fast.model.backbone import ResNet
from detr_fast.runtime import multiplies_bf16

FLOORS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
CPU = torch.device("cpu")
# channels of x, of the result, stride, dilation
CASES = {
    "x is the shortcut": (64, 64, 1, 1),
    "a stage's first": (32, 64, 2, 1),
    "layer1's first": (16, 64, 1, 1),
    "dilated": (32, 64, 1, 2),
}
WIDTH = 16


def make_inputs(case: str, dtype: torch.dtype) -> list[Tensor]:
    """x, three or four weights, as many biases. Integers, few of a weight's not 0: every sum of the forward pass is
    exact in every dtype, and so no rounding decides at which side of a ReLU a value lies."""
    inputs, outputs, _, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, kept: float = 1.0) -> Tensor:
        kept_ones = torch.rand(size, generator=generator) < kept
        return (torch.randint(-1, 2, size, generator=generator) * kept_ones).to(dtype)

    x = draw(2, inputs, 9, 7).contiguous(memory_format=torch.channels_last)
    weights = [
        draw(WIDTH, inputs, 1, 1, kept=0.2),
        draw(WIDTH, WIDTH, 3, 3, kept=0.04),
        draw(outputs, WIDTH, 1, 1, kept=0.2),
    ]
    if inputs != outputs:
        weights.append(draw(outputs, inputs, 1, 1, kept=0.2))
    return [x, *weights, *(draw(len(weight)) for weight in weights)]


def run(function: Callable[..., Tensor], case: str) -> Callable[..., Tensor]:
    """Of x and weights, with biases that have no gradient."""
    convolutions = 3 + (CASES[case][0] != CASES[case][1])

    def of_inputs(x: Tensor, *rest: Tensor) -> Tensor:
        biases = [bias.detach() for bias in rest[convolutions:]]
        return function(x, list(rest[:convolutions]), biases, *CASES[case][2:])

    return of_inputs


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_eager(case: str, dtype: torch.dtype) -> None:
    if why_not_onednn(dtype):
        pytest.skip(str(why_not_onednn(dtype)))
    inputs = make_inputs(case, dtype)
    found, expected = run(bottleneck, case)(*inputs), run(bottleneck_ref, case)(*inputs)
    assert torch.equal(found, expected) and expected.std() > 0
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_same_function(run(bottleneck, case), run(bottleneck_ref, case), inputs, FLOORS[dtype])


@pytest.mark.parametrize("case", CASES)
def test_what_others_hold_is_not_changed(case: str) -> None:
    """Neither the inputs nor the gradient that arrives, which other blocks may share."""
    inputs = [each.requires_grad_() for each in make_inputs(case, torch.float32)]
    before = [each.detach().clone() for each in inputs]
    out = run(bottleneck, case)(*inputs)
    kept, arriving = out.detach().clone(), torch.randn_like(out)
    arrived = arriving.clone()
    out.backward(arriving)
    assert torch.equal(arriving, arrived) and torch.equal(out, kept)
    assert all(map(torch.equal, inputs, before))


def test_an_image_that_needs_no_gradient_gets_none() -> None:
    x, *rest = make_inputs("a stage's first", torch.float32)
    weights = [each.requires_grad_() for each in rest[:4]]
    grads = [
        torch.autograd.grad(form(x, weights, rest[4:], 2, 1).sum(), weights) for form in (bottleneck, bottleneck_ref)
    ]
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain)


def test_memory_of_any_order_is_taken() -> None:
    inputs, block = make_inputs("x is the shortcut", torch.float32), run(bottleneck, "x is the shortcut")
    found = block(*(each.contiguous() for each in inputs))
    assert torch.equal(found, block(*inputs)) and found.is_contiguous(memory_format=torch.channels_last)


def test_what_it_cannot_compute_is_refused() -> None:
    x, *rest = make_inputs("dilated", torch.float16)
    with pytest.raises(ValueError, match="float16"):
        bottleneck(x, rest[:4], rest[4:])
    with pytest.raises(ValueError, match="one dtype"):
        bottleneck(x.float(), rest[:4], rest[4:])
    with pytest.raises(ValueError, match="not on meta"):
        bottleneck(x.to("meta"), rest[:4], rest[4:])


@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_registered_as_torch_asks(case: str) -> None:
    x, *rest = (each.requires_grad_() for each in make_inputs(case, torch.float32))
    convolutions = len(rest) // 2
    biases = [each.detach() for each in rest[convolutions:]]
    torch.library.opcheck(forward_op, (x, rest[:convolutions], biases, *CASES[case][2:]))


@pytest.mark.parametrize("dilation", [False, True])
def test_the_backbone_runs_it_and_is_the_same(dilation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = ResNet((2, 2, 1, 1), dilation)
    images = torch.randn(2, 3, 65, 97)
    calls = []

    def counted(*args: object) -> Tensor:
        calls.append(args)
        return bottleneck(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("detr_fast.model.backbone.bottleneck", counted)
    parameters = [each for each in backbone.parameters() if each.requires_grad]
    found = [backbone(images)]
    found += torch.autograd.grad(found[0].square().mean(), parameters)
    assert len(calls) == 6
    for module in backbone.modules():
        if hasattr(module, "convolution_form"):
            module.convolution_form = "ref"
    plain = [backbone(images)]
    plain += torch.autograd.grad(plain[0].square().mean(), parameters)
    assert len(calls) == 6
    for mine, other in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_under_autocast_it_computes_in_autocasts_dtype() -> None:
    if not multiplies_bf16(CPU):
        pytest.skip("this processor has no bf16")
    torch.manual_seed(0)
    backbone = ResNet((1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone(torch.randn(1, 3, 64, 64)).dtype == torch.bfloat16
