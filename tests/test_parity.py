"""Parity says that ours is the reference's function, and where it is not says so, and where."""

import json
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling import parity
from detr_profiling.baselines.build import build_baseline
from detr_profiling.comparison.blocks import observe_with_blocks
from detr_profiling.comparison.judgement import Row, judge, worst
from detr_profiling.comparison.own_outputs import cost_above_least, equal_matches
from detr_profiling.comparison.record import error_histogram, sampled
from detr_profiling.comparison.variants import Variant, build_variants
from detr_profiling.observation import Observation
from detr_profiling.own_workload import build_workload
from detr_profiling.parity import OutputParity, ParityOptions, main
from detr_profiling.workload import WorkloadOptions
from torch import Tensor, nn

from detr_fast.config import MODELS, UserError
from detr_fast.training.optimizer import build_optimizer

OPTIONS = WorkloadOptions.of(size="32x256", batch_size=2, objects=3, device="cpu", precision="fp32", threads=1)
"""8 tokens, of which the second image, an eighth narrower, has 7."""
FP32 = Variant("fp32", OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def few_layers() -> Iterator[None]:
    """Two layers of encoder and decoder each, which are all that one is like the next for."""
    with pytest.MonkeyPatch.context() as patch:
        small = replace(MODELS["detr_r50"], encoder_layers=2, decoder_layers=2, num_queries=20)
        patch.setitem(MODELS, "detr_r50", small)
        yield


@pytest.fixture(scope="module")
def outputs() -> OutputParity:
    return OutputParity(OPTIONS)


@pytest.fixture(scope="module")
def found(outputs: OutputParity) -> Observation:
    observed, rows = outputs.compare(FP32)
    assert not far(rows)
    return observed


def far(rows: list[Row]) -> list[str]:
    return [row.quantity for row in rows if not row.close]


def test_every_quantity_has_its_row(outputs: OutputParity, found: Observation) -> None:
    rows = judge(found, outputs.reference, outputs.eager_in("fp32"))
    kinds = {
        kind: [row.quantity for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)
    }
    stages = [f"backbone.{name}" for name in ("stem", "layer1", "layer2", "layer3", "layer4")]
    layers = [f"{stack}.layers.{index}" for stack in ("encoder", "decoder") for index in range(2)]
    assert kinds["block"] == [*stages, "input_proj", *layers]
    assert kinds["output"] == ["logits", "boxes", "scale of blocks and outputs"]
    assert len(kinds["loss"]) == 1 + 2 * 3 + 1 and len(kinds["match"]) == 1
    groups = ("encoder", "decoder", "heads", "backbone.layer2", "backbone.layer3", "backbone.layer4")
    assert {f"gradients of {name}" for name in (*groups, "all")} | {"scale of gradients"} == set(kinds["gradient"])
    assert {f"update of {name}" for name in groups} | {"losses after a step"} == set(kinds["update"])
    assert all(0 <= row.error <= row.allowed for row in rows) and worst(rows).fraction_used < 1
    assert outputs.reference["update loss"] < outputs.reference["loss"]
    assert all(outputs.reference[name] > 0 for name in outputs.reference if name.startswith("update of"))


def test_bf16_is_judged_by_what_bf16_does_to_the_reference(outputs: OutputParity) -> None:
    found, rows = outputs.compare(Variant("bf16", OPTIONS.but(precision="bf16")))
    assert not far(rows)
    as_fp32 = far(judge(found, outputs.reference, outputs.eager_in("fp32")))
    assert {"logits", "encoder.layers.1", "gradients of all"} <= set(as_fp32)


def test_packed_tokens_are_brought_into_rows() -> None:
    """Of four images: the third has a token less, so the fourth's lie elsewhere."""
    options = OPTIONS.but(batch_size=4, mode="inference")
    workload = build_workload(options.but(attention="triton"))
    assert workload.model.transformer.packed  # type: ignore[union-attr]
    found, exact = map(observe_with_blocks, (workload, build_baseline("reference", options, torch.float64)))
    for name in ("block encoder.layers.0", "block encoder.layers.1", "block decoder.layers.1"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=2e-5)
    assert not found["block encoder.layers.1"][3, -1].any() and found["block encoder.layers.1"][3, -2].all()


def test_a_compiled_forward_has_no_blocks(outputs: OutputParity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr("detr_fast.runtime.missing_for_compile", lambda: None)
    found, rows = outputs.compare(Variant("fp32 compiled", OPTIONS.but(compile=True)))
    assert not far(rows) and not any(row.kind == "block" for row in rows) and "logits" in found


def test_hugging_face_is_compared_in_inference(outputs: OutputParity, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="pip install 'detr-fast[reference]'")
    (variant,) = [each for each in build_variants(OPTIONS) if each.baseline]
    exact = outputs.reference["logits"][-1:].float()
    answer = {"logits": exact, "boxes": outputs.reference["boxes"][-1:].float()}
    stand_in = replace(build_workload(OPTIONS), observe=lambda: answer)  # its sizes are not cut: tests/test_workload.py
    build_baseline = parity.build_baseline
    monkeypatch.setattr(
        parity, "build_baseline", lambda name, *rest: stand_in if name[:2] == "hf" else build_baseline(name, *rest)
    )
    _, rows = outputs.compare(variant)
    assert [row.quantity for row in rows] == ["logits", "boxes", "scale of blocks and outputs"] and not far(rows)
    answer["logits"] = exact * 1.01
    assert "logits" in far(outputs.compare(variant)[1])


def test_an_inference_has_blocks_and_outputs() -> None:
    options = OPTIONS.but(mode="inference")
    _, rows = OutputParity(options).compare(Variant("fp32", options))
    assert not far(rows) and {row.kind for row in rows} == {"block", "output"}


def nth_call(function: Callable[..., Tensor], number: int) -> Callable[..., Tensor]:
    """`function`, its output off by 1 % at one of the calls of a forward."""
    calls = iter(range(10**6))

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        result = function(*arguments, **options)
        return result * 1.01 if next(calls) == number else result

    return wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("operation", "number", "block"),
    [
        ("detr_kernels.convolution.stage.add_convolution", 4, "backbone.layer2"),
        ("detr_fast.model.transformer.fused_add_layer_norm", 3, "encoder.layers.1"),
    ],
    ids=["a convolution", "a layer norm"],
)
def test_a_kernel_that_is_off_by_a_percent_once(
    operation: str, number: int, block: str, precision: Any, outputs: OutputParity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the first block that is not close is where it is; bf16's rounding is as large, but has no scale."""
    workload = build_workload(OPTIONS.but(precision=precision, mode="inference", optimize=False))
    monkeypatch.setattr(operation, nth_call(pkgutil.resolve_name(operation), number))
    found = observe_with_blocks(workload)
    blocks = [name for name in found if name.startswith("block ")]
    exact, eager = ({name: side[name] for name in blocks} for side in (outputs.reference, outputs.eager_in(precision)))
    wrong = far(judge({name: found[name] for name in blocks}, exact, eager))
    assert wrong[0] == block if precision == "fp32" else "scale of blocks and outputs" in wrong


def test_a_step_that_is_one_percent_too_long(outputs: OutputParity, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_longer(model: nn.Module, lr: float, **others: float) -> torch.optim.AdamW:
        return build_optimizer(model, 1.01 * lr, **others)

    monkeypatch.setattr("detr_profiling.own_workload.build_optimizer", build_longer)
    wrong = far(outputs.compare(FP32)[1])
    assert {f"update of {name}" for name in ("encoder", "decoder", "heads")} <= set(wrong)
    assert not any("backbone" in name or "gradient" in name for name in wrong)


Change = Callable[[Observation], object]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda o: o["logits"][0, 1, 3].fill_(math.nan), {"logits", "scale of blocks and outputs"}),
        (lambda o: o["boxes"][-1, 0, 0].add_(1e-3), {"boxes"}),
        (lambda o: o["block encoder.layers.0"][1, 2].mul_(1.01), {"encoder.layers.0"}),
        (lambda o: o["loss_giou_0"].mul_(1.001), {"losses", "loss_giou_0, from its outputs"}),
        (lambda o: o["loss"].mul_(1.001), {"losses", "loss, from its outputs"}),
        (lambda o: o.pop("gradient input_proj.weight"), {"gradient input_proj.weight"}),
        (lambda o: o["gradient input_proj.bias"].zero_(), {"gradients of encoder", "scale of gradients"}),
        (lambda o: o["gradient class_embed.weight"].mul_(1.01), {"scale of gradients"}),
        (lambda o: o["gradient backbone.layer3.2.conv2.weight"].neg_(), {"gradients of backbone.layer3"}),
        (
            lambda o: o["gradient backbone.layer4.0.conv1.weight"][0, 0].fill_(math.inf),
            {"gradients of backbone.layer4"},
        ),
        (lambda o: o.update({"gradient backbone.conv1.weight": torch.ones(1)}), {"gradient backbone.conv1.weight"}),
        (lambda o: o["matches"][0, 1, :2].copy_(o["matches"][0, 1, :2].flip(0)), {"matches, cost above the least"}),
        (lambda o: o["matches"][0, 0, -1].fill_(5), {"matches, cost above the least"}),  # the image has no such target
        (lambda o: o["matches"][1, 1, 0].fill_(-1), {"matches, cost above the least"}),
        (lambda o: o["update of heads"].mul_(1.01), {"update of heads"}),
        (lambda o: o["update loss_ce"].mul_(1.01), {"losses after a step"}),
    ],
)
def test_what_is_wrong_is_named(change: Change, wrong: set[str], outputs: OutputParity, found: Observation) -> None:
    spoilt = {name: value.clone() for name, value in found.items()}
    change(spoilt)
    rows = judge(spoilt, outputs.reference, outputs.eager_in("fp32"))
    assert wrong <= set(far(rows)) and worst(rows).quantity in far(rows)


def test_an_oracle_or_an_eager_form_that_is_broken_approves_nothing(outputs: OutputParity, found: Observation) -> None:
    broken = {**outputs.reference, "logits": outputs.reference["logits"] * math.nan}
    eager = outputs.eager_in("fp32")
    assert "logits" in far(judge(found, broken, eager))
    assert "logits" in far(judge(found, outputs.reference, eager | {"logits": eager["logits"] * math.nan}))


def test_matches_that_cost_the_same_are_equally_good() -> None:
    cost = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 9.0]], dtype=torch.float64)
    assert cost_above_least(cost, torch.tensor([0, 1])) == cost_above_least(cost, torch.tensor([1, 0])) == 0
    assert cost_above_least(cost, torch.tensor([2, 1])) == 4
    for no_matches in ([0, 0], [0, -1]):
        assert math.isnan(cost_above_least(cost, torch.tensor(no_matches)))
    assert cost_above_least(cost.T, torch.tensor([0, -1, 1])) == 10 - 3  # more targets than queries
    same, other = torch.tensor([[[0, 1, -1]]]), torch.tensor([[[0, 2, -1]]])
    assert equal_matches({"matches": other}, {"matches": same}) == 0.5


def test_a_row_goes_into_json() -> None:
    row = Row.missing("logits", "output")
    assert json.loads(json.dumps(row.to_dict(), allow_nan=False))["error"] is None and row.fraction_used == math.inf
    assert worst([Row("a", "loss", 2, 1, 4, True), row, Row("b", "loss", 9, 1, 4, False)]) in (row,)
    assert Row("exact", "match", 0.0, 0.0, 0.0, True).fraction_used == 0


def test_samples_and_histogram() -> None:
    exact, found = torch.zeros(40, 50), torch.full((40, 50), 2e-3)
    found[0, 0], found[0, 1] = math.nan, 0
    pairs = sampled(exact, found)
    assert len(pairs) == 500 and all(pair[0] == 0 for pair in pairs)
    histogram = error_histogram(exact, found)
    assert sum(histogram["counts"]) == 1999 and len(histogram["edges_log10"]) == len(histogram["counts"]) + 1
    assert histogram["edges_log10"][0] == -12 and histogram["edges_log10"][-1] == -2.5
    json.dumps([sampled(exact, found * math.inf), error_histogram(exact, found * math.nan)], allow_nan=False)


def test_variants() -> None:
    names = [variant.name for variant in build_variants(OPTIONS.but(precision="auto", compile=True))]
    assert names == ["fp32 ref", "fp32", "bf16", "hf", "fp32 compiled", "bf16 compiled"]
    asked = build_variants(OPTIONS.but(kernels="triton", attention="sdpa"))
    assert [variant.name for variant in asked] == ["fp32 ref", "fp32", "fp32 triton sdpa", "hf"]
    assert asked[2].options.runtime.attention == "sdpa" and asked[1].options.runtime.kernels == "auto"
    with pytest.raises(UserError, match="Use --precision bf16"):
        build_variants(OPTIONS.but(precision="fp16"))
    with pytest.raises(UserError, match="--steps 1"):
        ParityOptions.of(steps=1)


def run_main(
    out: Path, monkeypatch: pytest.MonkeyPatch, outputs: OutputParity, data: Path, variant: Variant = FP32
) -> tuple[int, dict[str, Any]]:
    """Of one variant, with the reference's side that is there already, and a curve of few images."""
    monkeypatch.setattr(parity, "build_variants", lambda options: [variant])
    monkeypatch.setattr(parity, "OutputParity", lambda options: outputs)
    code = main(ParityOptions.of(**OPTIONS.to_dict(), output=str(out), data=str(data), steps=2))
    return code, json.loads((out / "parity.json").read_text())


def test_the_command_leaves_its_result(
    outputs: OutputParity, tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, result = run_main(tmp_path, monkeypatch, outputs, shapes_root)
    assert (
        code == 0
        and result["close"]
        and result["finished"]
        and [path.name for path in tmp_path.iterdir()] == ["parity.json"]
    )
    assert {"machine", "workload", "variants", "samples", "error_histogram", "curve", "ap"} <= result.keys()
    (variant,) = result["variants"]
    assert variant["name"] == "fp32" and variant["close"] and variant["equal_matches"] == 1
    assert variant["rows"][0].keys() == {"quantity", "kind", "error", "eager_error", "allowed", "close"}
    assert (
        len(result["samples"]["fp32"]["logits"]) == 500
        and sum(result["error_histogram"]["fp32"]["counts"]) == 2 * 2 * 20 * 92
    )
    assert {name: len(losses) for name, losses in result["curve"]["losses"].items()} == {"reference": 2, "fp32": 2}
    assert result["ap"]["images"] == 12 and {row["name"] for row in result["ap"]["rows"]} == {"reference", "fp32"}


def test_the_command_fails_where_parity_does_not_hold(
    outputs: OutputParity, tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in (outputs.reference, outputs.eager_in("fp32")):
        monkeypatch.setitem(side, "logits", side["logits"] * 1.01)
    code, result = run_main(tmp_path, monkeypatch, outputs, shapes_root)
    assert code == 1 and not result["close"] and not result["variants"][0]["close"] and result["curve"]["close"]


def test_what_cannot_run_is_left_out_unless_it_was_asked_for(
    outputs: OutputParity, tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(variant: Variant) -> None:
        raise UserError("no such kernel here")

    monkeypatch.setattr(outputs, "compare", refuse)
    with pytest.raises(UserError, match="no such kernel"):
        run_main(tmp_path, monkeypatch, outputs, shapes_root)
    code, result = run_main(tmp_path, monkeypatch, outputs, shapes_root, replace(FP32, asked=False))
    assert result["left_out"] == {"fp32": "no such kernel here"} and code == 1  # nothing was compared
