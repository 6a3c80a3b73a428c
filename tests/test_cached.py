"""Constants are computed once, follow every change of what they come from, and nothing unreal is kept for others."""

import copy

import pytest
import torch
from detr_kernels.convolution.batch_norm import fold_frozen_bn, scale_weight, scale_weights
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from detr_fast.model.backbone import ResNet
from detr_fast.model.cached import Cached, may_be_cached
from detr_fast.model.normalization import FrozenBatchNorm2d, folded, folded_together


class Doubling:
    """Twice a tensor, kept; counts how often it is computed."""

    def __init__(self, source: Tensor) -> None:
        self.source, self.kept, self.computed = source, Cached(), 0

    def __call__(self) -> Tensor:
        return self.kept([self.source], self.compute)[0]

    def compute(self) -> list[Tensor]:
        self.computed += 1
        return [self.source * 2]


def test_it_is_computed_again_where_a_source_has_changed_and_in_the_same_memory() -> None:
    doubling = Doubling(nn.Parameter(torch.ones(3)))
    first = doubling()
    memory = first.data_ptr()  # which a captured graph reads
    assert doubling() is first and doubling.computed == 1 and not first.requires_grad
    with torch.no_grad():
        doubling.source.add_(1)
    assert doubling() is first and doubling.computed == 2
    assert torch.equal(first, torch.full((3,), 4.0)) and first.data_ptr() == memory
    doubling.source = nn.Parameter(torch.ones(5))
    assert doubling().shape == (5,)


def test_what_is_kept_serves_a_captured_graph_and_what_is_computed_in_one_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    doubling, other = Doubling(torch.ones(3)), Doubling(torch.ones(3))
    before = doubling()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert doubling() is before
    assert other() is not other() and other.computed == 2 and not may_be_cached(other.source)


def test_nothing_fake_is_kept_of_real_tensors_and_nothing_of_inference_mode() -> None:
    doubling = Doubling(torch.ones(3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(doubling()) is not Tensor
    assert type(doubling()) is Tensor
    other = Doubling(torch.ones(3))
    with torch.inference_mode():
        assert other().is_inference()
    assert not other().is_inference()


def test_a_traced_function_neither_reads_nor_keeps() -> None:
    doubling = Doubling(torch.ones(3))
    compiled = torch.compile(doubling, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), doubling.source * 2) and not doubling.kept.results


def make_pair(learns: bool = True) -> tuple[nn.Conv2d, FrozenBatchNorm2d]:
    generator = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, bias=False), FrozenBatchNorm2d(6)
    conv.weight.requires_grad_(learns)
    for tensor in norm.tensors():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return conv, norm


@pytest.mark.parametrize("learns", [True, False])
def test_a_folded_norm_follows_what_is_loaded_and_where_it_goes(learns: bool) -> None:
    conv, norm = make_pair(learns)
    pair, before = nn.Sequential(conv, norm), [each.clone() for each in folded(conv, norm, torch.float32)]
    kept = norm.cached["shift", torch.float32].results[0]
    pair.load_state_dict({name: value + 1 for name, value in pair.state_dict().items()})
    assert not torch.equal(kept, before[1]), "a replay would read what was before"
    for dtype in (torch.float32, torch.float64):
        pair.to(dtype)
        expected = fold_frozen_bn(conv.weight, *norm.tensors(), norm.eps)
        for found, value in zip(folded(conv, norm, dtype), expected, strict=True):
            assert found.dtype == dtype and torch.equal(found, value)
    assert not copy.deepcopy(norm).cached["norm", torch.float64].results


def test_only_what_does_not_learn_is_kept_whole() -> None:
    backbone = ResNet((1, 1, 1, 1))
    backbone(torch.zeros(1, 3, 32, 32))
    norms = {name: each for name, each in backbone.named_modules() if isinstance(each, FrozenBatchNorm2d)}
    whole = {name for name, norm in norms.items() if any(kind == "weight" for kind, _ in norm.cached)}
    assert whole == {name for name in norms if name.startswith(("bn1", "layer1"))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_scaled_together_are_those_scaled_alone(dtype: torch.dtype) -> None:
    pairs = [make_pair() for _ in range(3)]
    alone = folded_together(pairs, dtype)  # on a CPU each by itself
    weights, scales = [conv.weight for conv, _ in pairs], [norm.scale_like(conv.weight) for conv, norm in pairs]
    together = scale_weights(weights, scales, dtype)
    dys = [torch.randn(each.shape).to(dtype) for each in together]
    gradients = [torch.autograd.grad(each, weights, dys) for each in (together, [weight for weight, _ in alone])]
    for found, (expected, _) in zip(together, alone, strict=True):
        assert found.dtype == dtype and torch.equal(found, expected)
    assert all(map(torch.equal, *gradients))


def test_a_scale_has_its_weights_memory_order() -> None:
    conv, norm = make_pair()
    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scale = norm.scale_like(conv.weight)
    assert scale.stride() == conv.weight.stride()
    assert torch.equal(scale * conv.weight, scale_weight(conv.weight, scale[:, 0, 0, 0], torch.float32))
