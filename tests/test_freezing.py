"""A model made for inference alone: the same function as the model it was made from, which stays as it was."""

import copy
import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from detr_kernels import AttentionBackend, OneDNNConvolution
from detr_profiling.comparison.blocks import recorded_outputs
from detr_profiling.comparison.closeness import assert_close
from detr_profiling.limits.counting import count_work
from detr_profiling.tracing.allocations import living_tensors_mib
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from detr_fast import DETR, export_state_dict, load_model
from detr_fast.config import MODELS, UserError
from detr_fast.model import position_encoding
from detr_fast.model.freezing import for_inference, frozen
from detr_fast.model.implementation import Implementation
from detr_fast.model.normalization import FoldedConvolution, FrozenBatchNorm2d
from detr_fast.model.position_encoding import kept_position_encoding, sine_position_encoding
from detr_fast.runtime import multiplies_bf16, select_implementation

CONFIGS = {
    "resnet50": replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=2, num_queries=7, num_classes=5),
    "dc5": replace(MODELS["detr_r50_dc5"], encoder_layers=1, decoder_layers=1, num_queries=7, num_classes=5),
    "tiny": MODELS["detr_tiny"],
}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> DETR:
    """In evaluation mode, with norms that are not the identity and biases that are not zero."""
    torch.manual_seed(0)
    model = DETR(CONFIGS[name])
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            for each in (module.weight, module.running_var):
                each.data.uniform_(0.7, 1.3)
            for each in (module.bias, module.running_mean):
                each.data.normal_(0, 0.1)
    for name, parameter in model.transformer.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.to(dtype, memory_format=torch.channels_last).eval()


def make_input(dtype: torch.dtype, count: int = 2) -> tuple[Tensor, Tensor]:
    images = torch.randn(count, 3, 96, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.zeros(count, 96, 128, dtype=torch.bool)
    mask[-1, :, 100:] = True
    return images.masked_fill(mask[:, None], 0).contiguous(memory_format=torch.channels_last), mask


@torch.no_grad()
def outputs(model: DETR, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    images, mask = make_input(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        found = model(images, mask)
    return {name: found[name] for name in ("pred_logits", "pred_boxes")}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_function_in_float64(name: str) -> None:
    model = make_model(name, torch.float64)
    expected, found = outputs(model, torch.float64), outputs(frozen(model, torch.float64), torch.float64)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)  # outputs are float32


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "auto"], ids=["rows", "packed"])
def test_constants_are_what_every_image_gives(attention: AttentionBackend, count: int) -> None:
    """A shape without padding, which the model is told by a mask; the same with padding; then its sides exchanged: what
    is kept of the first is not taken for another."""
    model = make_model("tiny", torch.float64)
    Implementation(attention=attention).apply_to(model)
    made = frozen(model, torch.float64)
    images, mask = make_input(torch.float64, count)
    nowhere = torch.zeros_like(mask)
    for seen, told, needed in [(images, nowhere, None), (images, mask, mask), (images.mT, nowhere.mT, None)]:
        with torch.no_grad(), recorded_outputs(model) as expected, recorded_outputs(made) as found:
            model(seen, told)
            made(seen, needed)
        decoder = [name for name in expected if name.startswith("decoder")]
        assert len(decoder) == 3
        for name in decoder:  # float64, where the model's outputs are float32
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)


def test_no_image_pays_for_the_constants() -> None:
    model = make_model("tiny")
    made, (images, _) = frozen(model, torch.float32), make_input(torch.float32, 3)
    counts = []
    for each in (model, made):
        with torch.no_grad():
            counts.append(count_work(partial(each, images))["decoder"].flop)
    queries, dim = model.config.num_queries, model.config.hidden_dim
    projections, attention = 5 * 2 * queries * dim**2, 2 * 2 * queries**2 * dim  # four of self-attention and one more
    assert counts[0] - counts[1] == 3 * (projections + attention)


def test_positions_are_computed_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(mask: Tensor, dim: int) -> Tensor:
        asked.append(tuple(mask.shape))
        return sine_position_encoding(mask, dim)

    monkeypatch.setattr(position_encoding, "sine_position_encoding", counted)
    kept_position_encoding.cache_clear()
    made = frozen(make_model("tiny"), torch.float32)
    with torch.no_grad():
        for count, height, width in [(1, 64, 96), (2, 64, 96), (1, 96, 64), (1, 64, 96)]:
            made(torch.randn(count, 3, height, width))
    assert asked == [(1, 8, 12), (1, 12, 8)]


def test_positions_that_are_not_real_are_not_kept() -> None:
    kept_position_encoding.cache_clear()
    made = frozen(make_model("tiny"), torch.float32)
    with FakeTensorMode():
        assert isinstance(made._places(None, torch.empty(1, 128, 8, 12))[1], FakeTensor)
    assert type(made._places(None, torch.empty(1, 128, 8, 12))[1]) is Tensor


def test_positions_of_few_shapes_are_kept() -> None:
    """Among more of them memory would grow with the data."""
    for width in range(1, 100):
        kept = weakref.ref(kept_position_encoding(1, width, 128, torch.float32, torch.device("cpu")))
        if width == 1:
            first = kept
    gc.collect()
    assert first() is None and kept() is not None


def test_constants_go_where_the_model_goes() -> None:
    made = frozen(make_model("tiny"), torch.float32)
    for device in (torch.device("cpu"), torch.device("meta")):
        position = kept_position_encoding(2, 3, 128, torch.float32, device)
        transformer, query_position = made.to(device).transformer, made.query_embed.weight
        states = transformer(torch.empty(4, 6, 128, device=device), None, query_position, position)
        assert position.device == states.device == device


@pytest.mark.parametrize("padded", [True, False])
def test_it_compiles_to_one_graph(padded: bool) -> None:
    made, (images, mask) = frozen(make_model("tiny"), torch.float32), make_input(torch.float32)
    given = (images, mask if padded else None)
    with torch.no_grad():
        found = torch.compile(made, fullgraph=True, backend="aot_eager")(*given)
        expected = made(*given)
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_exact_as_the_references_own_operations(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    model = make_model(name)
    oracle = outputs(make_model(name, torch.float64), torch.float64)
    found = outputs(frozen(model, dtype), dtype)
    select_implementation(model, "ref", "ref")
    eager = outputs(model, dtype)
    for key, value in oracle.items():
        assert_close(found[key], value, eager[key], 1e-5 * value.abs().max().item(), key)


def test_all_batch_norm_is_gone_and_layer_norm_keeps_float32() -> None:
    for name in CONFIGS:
        made = frozen(make_model(name), torch.bfloat16)
        assert not any(isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d) for module in made.modules())
        folded = [module for module in made.modules() if isinstance(module, FoldedConvolution)]
        assert len(folded) == {"resnet50": 53, "dc5": 53, "tiny": 9}[name]
        assert all(module.weight.dtype == torch.bfloat16 for module in folded)
        kinds = {
            parameter.dtype
            for module in made.modules()
            if isinstance(module, nn.LayerNorm)
            for parameter in module.parameters()
        }
        assert kinds == {torch.float32}


def test_what_a_block_gave_is_recorded_before_the_next_writes_over_it() -> None:
    model = make_model("tiny")
    recorded = []
    for each in (model, frozen(model, torch.float32)):
        with torch.no_grad(), recorded_outputs(each) as blocks:
            each(*make_input(torch.float32))
        recorded.append(blocks)
    expected, found = recorded
    assert "backbone.stem" in expected and expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


def test_a_packed_weight_is_counted_among_the_living() -> None:
    convolution = OneDNNConvolution(torch.randn(256, 256, 3, 3), torch.zeros(256), 1, 1, 1)  # 2.25 MiB
    x = torch.randn(1, 256, 4, 4).contiguous(memory_format=torch.channels_last)
    before = living_tensors_mib()
    convolution(x, None, True)
    assert living_tensors_mib() - before == pytest.approx(2.25, abs=0.2)


def test_the_model_it_was_made_from_stays_as_it_was() -> None:
    model = make_model("tiny").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen(model, torch.bfloat16)
    assert model.training and not model.frozen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())


def test_it_is_for_inference_alone() -> None:
    made = frozen(make_model("tiny"), torch.float32)
    assert frozen(made, torch.float32) is made
    with pytest.raises(UserError, match="optimize=True"):
        made.train()
    with pytest.raises(UserError, match="optimize=True"):
        export_state_dict(made)


def test_detrs_own_operations_are_kept_where_they_are_asked_for() -> None:
    model = make_model("tiny")
    select_implementation(model, "ref", "ref")
    assert for_inference(model, torch.float32) is model
    select_implementation(model)
    assert for_inference(model, torch.float32).frozen


def test_one_word_makes_a_loaded_model_fast(tmp_path: Path) -> None:
    model = make_model("tiny")
    torch.save({"model": model.state_dict(), "model_config": model.config.to_dict()}, tmp_path / "model.pt")
    plain, fast = load_model(tmp_path / "model.pt"), load_model(tmp_path / "model.pt", optimize=True)
    assert fast.frozen and not plain.frozen
    image = torch.randint(256, (80, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    (expected,), (found,) = plain.predict(image, threshold=0.0), fast.predict(image, threshold=0.0)
    assert len(found) == len(expected)
    tolerance = 0.05 if multiplies_bf16(torch.device("cpu")) else 1e-4
    torch.testing.assert_close(found.scores.sort()[0], expected.scores.sort()[0], atol=tolerance, rtol=0)


def test_a_copy_of_one_that_has_run_computes_the_same() -> None:
    made = frozen(make_model("resnet50"), torch.float32)
    expected = outputs(made)
    for key, value in outputs(copy.deepcopy(made)).items():
        torch.testing.assert_close(value, expected[key])
