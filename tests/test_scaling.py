"""Many GPUs on paper: the formulas against numbers worked out by hand, their limits, and where a step comes from."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from detr_profiling.limits.exchange import PLANNING_US, Links, Step, not_hidden_ms, scaled
from detr_profiling.pages.results import load_results
from detr_profiling.pages.scaling import figures
from detr_profiling.report import render_html, render_markdown, table_line
from detr_profiling.scaling import ScalingOptions, find_basis, gradient_bytes, main, scaled_rows

from detr_fast.config import UserError
from tests.sample_results import ladder_rows, trace, write_results

LINKS = Links(gpus_a_machine=4, within_gb_s=100, between_gb_s=10, reached=0.5, within_us=2, between_us=5)
STEP = Step(ms=10, backward_ms=6, images=16, gradient_bytes=12_000_000)
BUCKET = 4_000_000
WITHIN_MS = 2 * 3 / 4 * 8e6 / 50e6 + 6 * 0.002  # 50 MB a millisecond, 3 steps to reduce and 3 to gather


@pytest.mark.parametrize(
    ("gpus", "expected_ms"),
    [
        (1, 0.0),
        (2, 2 * 1 / 2 * 8e6 / 50e6 + 2 * 0.002),
        (4, WITHIN_MS),
        (8, WITHIN_MS + 2 * 1 / 2 * 2e6 / 5e6 + 2 * 0.005),  # a quarter of the bytes to one other machine
        (32, WITHIN_MS + 2 * 7 / 8 * 2e6 / 5e6 + 6 * 0.005),  # 8 machines: 3 steps up a tree and 3 down
    ],
)
def test_an_all_reduce_by_hand(gpus: int, expected_ms: float) -> None:
    assert LINKS.all_reduce_ms(gpus, 8e6) == pytest.approx(expected_ms)


def test_only_the_last_bucket_is_seen_where_each_is_faster_than_the_next_one_comes() -> None:
    row = scaled(STEP, 4, LINKS, BUCKET)
    bucket_ms, normalizers_ms = 2 * 3 / 4 * 4e6 / 50e6 + 0.012, 2 * 3 / 4 * 8 / 50e6 + 0.012
    assert row.exchange_ms == pytest.approx(3 * bucket_ms + normalizers_ms)
    assert row.exposed_ms == pytest.approx(bucket_ms + normalizers_ms)
    assert row.step_ms == pytest.approx(10 + row.exposed_ms)
    assert row.images_per_second == pytest.approx(1e3 * 4 * 16 / row.step_ms)
    assert row.efficiency == pytest.approx(10 / row.step_ms)


def test_buckets_wait_for_one_another() -> None:
    """They come at 2, 4 and 6 ms, and each takes 5: the last one ends at 17."""
    assert not_hidden_ms(STEP, 3, lambda nbytes: 5.0) == 17 - 6
    assert not_hidden_ms(STEP, 3, lambda nbytes: 1.5) == 1.5
    assert not_hidden_ms(STEP, 1, lambda nbytes: nbytes / 1e6) == 12


def test_nothing_is_hidden_of_an_exchange_after_the_backward_pass() -> None:
    row = scaled(STEP, 8, LINKS, None)
    assert row.exposed_ms == pytest.approx(row.exchange_ms)
    assert row.exchange_ms == pytest.approx(LINKS.all_reduce_ms(8, 12e6) + LINKS.all_reduce_ms(8, 8))


def test_planning_is_beside_the_steps_until_it_takes_longer_than_they_do() -> None:
    """For all images of all GPUs: image by image a step of 64 GPUs would wait for it even in a thread of its own."""
    row = scaled(STEP, 64, LINKS, BUCKET)
    assert row.planning_ms == pytest.approx(PLANNING_US * 16 * 64 / 1e3)
    assert row.step_ms == pytest.approx(10 + row.exposed_ms)
    slow = scaled(STEP, 64, LINKS, BUCKET, planning_us=27)
    assert slow.step_ms == slow.planning_ms == pytest.approx(27.648)
    assert slow.efficiency == pytest.approx(10 / 27.648)


@pytest.mark.parametrize("bucket", [BUCKET, None])
def test_limits(bucket: float | None) -> None:
    alone = scaled(STEP, 1, LINKS, bucket)
    assert (alone.exchange, alone.exchange_ms, alone.exposed_ms, alone.step_ms) == ("none", 0, 0, 10)
    assert alone.efficiency == 1 and alone.images_per_second == 1600
    ideal = replace(LINKS, within_gb_s=math.inf, between_gb_s=math.inf, within_us=0, between_us=0)
    assert scaled(STEP, 64, ideal, bucket).efficiency == 1
    by_gpus = [scaled(STEP, gpus, LINKS, bucket).efficiency for gpus in (1, 2, 4, 8, 16, 64, 256)]
    assert by_gpus == sorted(by_gpus, reverse=True) and len(set(by_gpus)) == 7
    for name in ("within_gb_s", "between_gb_s"):
        faster = [scaled(STEP, 64, replace(LINKS, **{name: 10.0**power}), bucket).efficiency for power in range(-1, 5)]
        assert faster == sorted(faster)
    for gpus in (4, 64):
        row = scaled(STEP, gpus, LINKS, bucket)
        assert 0 < row.exposed_ms < 1.000001 * row.exchange_ms


def test_gradients_are_those_of_what_is_trained() -> None:
    """Of 41,524,768 parameters the first convolution and layer1 are frozen."""
    assert gradient_bytes("detr_r50") == 4 * (41_524_768 - 64 * 3 * 49 - 212_992)


def test_a_step_comes_from_the_ladder_and_its_backward_pass_from_the_trace(tmp_path: Path) -> None:
    options = ScalingOptions(out=str(tmp_path))
    with pytest.raises(UserError, match="--step-ms"):
        find_basis(options)
    traced = trace(gpu=True)
    traced["stages"][1]["device_ms"] *= 3  # the host's share is another
    write_results(tmp_path, trace=traced)
    basis = find_basis(options)
    assert (basis.model, basis.batch_size, basis.step_from) == ("detr_r50", 1, "trace.json")
    assert basis.step_ms == traced["step_ms"]["median"]
    device_ms = {row["name"]: row["device_ms"] for row in traced["stages"]}
    assert basis.backward_share == pytest.approx(device_ms["backward"] / sum(device_ms.values()))
    write_results(tmp_path, ladder=ladder_rows("inference", faster=9.0) + ladder_rows())
    basis = find_basis(options)
    assert (basis.step_ms, basis.step_from, basis.backward_from) == (401.6, "ladder.csv, compile", "trace.json")
    with pytest.raises(UserError, match="was detr_r50 with 1 images"):
        find_basis(replace(options, model="detr_r101"))
    given = find_basis(replace(options, model="detr_tiny", step_ms=5.0, batch_size=3, backward_share=0.5))
    assert (given.model, given.batch_size, given.step_ms, given.backward_share) == ("detr_tiny", 3, 5.0, 0.5)


def test_what_another_version_measured_is_named(tmp_path: Path) -> None:
    options = ScalingOptions(out=str(tmp_path))
    (tmp_path / "trace.json").write_text('{"machine": {}}')
    with pytest.raises(UserError, match=r"trace\.json cannot be used"):
        find_basis(options)
    (tmp_path / "trace.json").unlink()
    (tmp_path / "ladder.csv").write_text("mode,technique,median_ms\ntraining,reference,3\n")
    with pytest.raises(UserError, match=r"ladder\.csv cannot be used"):
        find_basis(options)


def test_a_trace_of_inference_is_none_of_a_step(tmp_path: Path) -> None:
    inference = trace()
    inference["workload"]["mode"] = "inference"
    write_results(tmp_path, trace=inference)
    with pytest.raises(UserError, match="No training step"):
        find_basis(ScalingOptions(out=str(tmp_path)))
    assumed = find_basis(ScalingOptions(out=str(tmp_path), step_ms=20.0))
    assert (assumed.backward_share, assumed.backward_from) == (0.6, "assumed")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpus": (12,)}, "--gpus 12"),
        ({"gpus": (0,)}, "--gpus 0"),
        ({"reached": 1.1}, "--reached"),
        ({"between_gb_s": 0}, "--between-gb-s"),
        ({"within_us": -1}, "--within-us"),
        ({"gpus_a_machine": 0}, "--gpus-a-machine"),
        ({"step_ms": 0}, "--step-ms"),
        ({"batch_size": 0}, "--batch-size"),
        ({"backward_share": 1}, "--backward-share"),
        ({"bucket_mib": 0}, "--bucket-mib"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScalingOptions(**wrong)


def test_the_command_shows_what_the_report_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ScalingOptions(out=str(tmp_path / "new"), step_ms=22.9, model="detr_tiny"))
    shown, results = capsys.readouterr().out, load_results(tmp_path / "new")
    assert results.scaling and [row["gpus"] for row in results.scaling["rows"]] == [1, 8, 8, 64, 64, 256, 256]
    assert "22.9 ms on one (given)" in " ".join(shown.split())
    assert "takes 1.23 ms a step with 256 GPUs" in " ".join(shown.split())
    page = render_markdown(results)
    for row in results.scaling["rows"]:
        assert " ".join(figures(row)) in " ".join(shown.split()) and table_line(figures(row)) in page
    assert "Many GPUs" in render_html(results)
    (tmp_path / "new" / "scaling.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match=r"scaling\.json cannot be used: .*detr_profiling scaling --out"):
        render_markdown(load_results(tmp_path / "new"))


def test_the_readme_has_what_its_command_computes() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    options = ScalingOptions(step_ms=22.9)
    assert f"scaling --step-ms {options.step_ms}" in readme
    step = Step(22.9, 0.6 * 22.9, 16, gradient_bytes("detr_r50"))
    for row in scaled_rows(options, step):
        assert table_line(figures(vars(row))) in readme
    assert f"{row.gpus} GPUs\n{row.planning_ms:.3g} ms of it a step" in readme
