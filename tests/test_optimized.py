"""A network optimised for inference: the same function as the one it was made from, which stays as it was."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detr_kernels import OneDNNConvolution
from detr_profiling.comparison.blocks import recorded_outputs
from detr_profiling.comparison.closeness import assert_close
from detr_profiling.tracing.allocations import living_tensors_mib
from torch import Tensor, nn

from detr_fast import DETR, export_state_dict, load_model
from detr_fast.config import MODELS, UserError
from detr_fast.detector import Detector
from detr_fast.model.backends import select_backends
from detr_fast.model.normalization import FoldedConvolution, FrozenBatchNorm2d
from detr_fast.model.optimized import OptimizedDETR, optimized
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import choose_runtime, multiplies_bf16

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
            tensors = module.state_dict()
            for each in ("weight", "running_var"):
                tensors[each].uniform_(0.7, 1.3)
            for each in ("bias", "running_mean"):
                tensors[each].normal_(0, 0.1)
    for name, parameter in model.transformer.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.to(dtype).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


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
    expected, found = outputs(model, torch.float64), outputs(optimized(model, torch.float64), torch.float64)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)  # outputs are float32


@pytest.mark.parametrize("attention", ["sdpa", "triton"], ids=["rows", "packed"])
def test_positions_of_an_image_without_padding_are_those_under_an_empty_mask(attention: str) -> None:
    """One position encoding for all images then; of another shape it is another."""
    torch.manual_seed(0)
    model = DETR(replace(CONFIGS["tiny"], encoder_layers=1, decoder_layers=1)).eval()
    select_backends(model, named={"attention": attention})
    images = make_input(torch.float32)[0][..., :64]
    for seen in (images, images.mT):
        with torch.no_grad():
            expected, found = model(seen, torch.zeros_like(seen[:, 0], dtype=torch.bool)), model(seen)
        torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_exact_as_the_references_own_operations(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    model = make_model(name)
    exact = outputs(make_model(name, torch.float64), torch.float64)
    found = outputs(optimized(model, dtype), dtype)
    select_backends(model, "ref", "ref")
    eager = outputs(model, dtype)
    for key, value in exact.items():
        assert_close(found[key], value, eager[key], 1e-5 * value.abs().max().item(), key)


def test_all_batch_norm_is_gone_and_layer_norm_keeps_float32() -> None:
    for name in CONFIGS:
        made = optimized(make_model(name), torch.bfloat16)
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
    for each in (model, optimized(model, torch.float32)):
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
    optimized(model, torch.bfloat16)
    assert model.training and not isinstance(model, OptimizedDETR)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())


def test_it_is_for_inference_alone() -> None:
    made = optimized(make_model("tiny"), torch.float32)
    assert optimized(made, torch.float32) is made
    with pytest.raises(UserError, match="optimize=True"):
        made.train()
    with pytest.raises(UserError, match="optimize=True"):
        export_state_dict(made)


@pytest.mark.parametrize("padded", [True, False])
def test_it_compiles_to_one_graph(padded: bool) -> None:
    made, (images, mask) = optimized(make_model("tiny"), torch.float32), make_input(torch.float32)
    given = (images, mask if padded else None)
    with torch.no_grad():
        found = torch.compile(made, fullgraph=True, backend="aot_eager")(*given)
        expected = made(*given)
    torch.testing.assert_close(found["pred_logits"], expected["pred_logits"], rtol=1e-4, atol=1e-4)


def test_detrs_own_operations_are_kept_where_they_are_asked_for() -> None:
    network = make_model("tiny")
    for kernels in ("ref", "auto"):
        detector = Detector(network).optimize(choose_runtime(RuntimeOptions(device="cpu", kernels=kernels)))
        assert isinstance(detector.network, OptimizedDETR) == (kernels == "auto")
        assert (detector.network is network) == (kernels == "ref")


def test_one_word_makes_a_loaded_model_fast(tmp_path: Path) -> None:
    model = make_model("tiny")
    torch.save({"model": model.state_dict(), "model_config": model.config.to_dict()}, tmp_path / "model.pt")
    plain, fast = load_model(tmp_path / "model.pt"), load_model(tmp_path / "model.pt", optimize=True)
    assert isinstance(fast.network, OptimizedDETR) and not isinstance(plain.network, OptimizedDETR)
    image = torch.randint(256, (80, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    (expected,), (found,) = plain.predict(image, threshold=0.0), fast.predict(image, threshold=0.0)
    assert len(found) == len(expected)
    tolerance = 0.05 if multiplies_bf16(torch.device("cpu")) else 1e-4
    torch.testing.assert_close(found.scores.sort()[0], expected.scores.sort()[0], atol=tolerance, rtol=0)


def test_a_copy_of_one_that_has_run_computes_the_same() -> None:
    made = optimized(make_model("resnet50"), torch.float32)
    expected = outputs(made)
    for key, value in outputs(copy.deepcopy(made)).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("name", ["resnet50", "tiny"])
def test_one_that_has_run_follows_what_is_loaded(name: str) -> None:
    """Its packed weights are copies."""
    made, other = (optimized(make_model(name), torch.float32) for _ in range(2))
    before = outputs(made)["pred_logits"]
    for module in other.modules():
        if isinstance(module, FoldedConvolution):
            module.weight.mul_(1.1)
    made.load_state_dict(other.state_dict())
    found, expected = outputs(made), outputs(other)
    assert not torch.allclose(expected["pred_logits"], before)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("name", ["resnet50", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_detector_may_be_cast_to_what_its_backends_do_not_compute_in(name: str, dtype: torch.dtype) -> None:
    """Those were chosen for float32: oneDNN has no float64, nor float16 on most processors."""
    detector = Detector(make_model(name)).optimize(choose_runtime(RuntimeOptions(device="cpu", precision="fp32")))
    image = torch.randint(256, (80, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    (expected,), (found,) = detector.predict(image, 0.0), detector.to(dtype).predict(image, 0.0)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0.01, check_dtype=False)


def test_one_that_has_run_may_be_cast_and_moved() -> None:
    """Its packed weights are of the dtype it ran in."""
    made = optimized(make_model("resnet50"), torch.float32)
    expected = outputs(made)
    for key, value in outputs(made.to(torch.float64), torch.float64).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3, check_dtype=False)
