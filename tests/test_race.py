"""Ours compared with baselines: which run, in what order, and what the ratio is taken from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from detr_profiling import race, rounds
from detr_profiling.limits.counting import count_work
from detr_profiling.limits.peaks import Peaks
from detr_profiling.measuring.measurement import Configuration, Measurement
from detr_profiling.measuring.row import LadderRow, read_rows
from detr_profiling.measuring.timing import Timing
from detr_profiling.own_workload import build_workload
from detr_profiling.race import EAGER_BASELINES, RaceOptions, build_entries, fastest_eager_ms, peak_fraction

from detr_fast.config import UserError

OPTIONS = RaceOptions.of(device="cpu", precision="bf16", size="64x96", batch_size=1, runs=2, compiled_baseline=False)
TIMES_MS = {"reference": 100.0, "hf-eager": 90.0, "hf-sdpa": 80.0, "hf-compiled": 10.0, "detr_fast": 20.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Who was measured, in order; no process runs."""
    asked: list[str] = []

    def measure(configuration: Configuration, runs: int, references: Path | None, limit_s: object) -> Measurement:
        asked.append(configuration.implementation)
        if configuration.implementation == "hf-sdpa":
            raise UserError("not installed")
        return Measurement(Timing((TIMES_MS[configuration.implementation],) * runs), 1000.0, 0.1, None, 3.0)

    monkeypatch.setattr(rounds, "measure_in_process", measure)
    monkeypatch.setattr(rounds, "write_references_in_process", lambda *_: None)
    monkeypatch.setattr(race, "peak_fraction", lambda *_: 0.5)
    yield asked


def test_baselines_run_in_float32_and_ours_as_the_options_say() -> None:
    entries = {entry.name: entry.configuration for entry in build_entries(OPTIONS)}
    assert list(entries) == [*EAGER_BASELINES, "reference bf16", "detr_fast"]
    for name in EAGER_BASELINES:
        options = entries[name].options.runtime
        assert (options.precision, options.compile, options.channels_last) == ("fp32", False, False)
    ours = entries["detr_fast"].options.runtime
    assert ours.precision == "bf16" and ours.channels_last
    assert {each.options.runtime.host_allocator for each in entries.values()} == {"auto"}
    as_they_come = build_entries(OPTIONS.but(same_settings=False))
    assert [entry.configuration.options.runtime.host_allocator for entry in as_they_come] == ["system"] * 4 + ["auto"]
    sizes = {(each.options.size, each.options.batch_size, each.options.runtime.threads) for each in entries.values()}
    assert len(sizes) == 1
    assert [each.options.mix.buckets for each in entries.values()] == [False] * 4 + [True]


def test_all_take_turns_and_the_ratio_is_over_the_fastest_eager_one(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = OPTIONS.but(output=str(tmp_path), rounds=2)
    assert race.main(options) == 1  # one baseline is not there
    assert measured == ["reference", "hf-eager", "hf-sdpa", "reference", "detr_fast"] * 2
    assert "4.50 times the fastest eager baseline" in capsys.readouterr().out
    rows = {row.technique: row for row in read_rows(tmp_path / "race.csv")}
    assert rows["detr_fast"].median_ms == 20 and rows["hf-sdpa"].note == "not installed"
    assert rows["hf-sdpa"].median_ms is None


def test_a_compiled_baseline_is_no_eager_one() -> None:
    assert fastest_eager_ms([LadderRow("training", name) for name in TIMES_MS]) is None
    assert fastest_eager_ms([LadderRow("training", name, ms) for name, ms in TIMES_MS.items()]) == 80.0


def test_the_share_of_the_peak_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS.workload.but(precision="fp32", mode="inference", threads=1)
    flop = sum(work.flop for work in count_work(build_workload(options).run).values())
    monkeypatch.setattr(race, "measure_peaks", lambda *_: Peaks(bandwidth_gb_s=20.0, gemm_tflop_s=0.5, dtype="fp32"))
    assert peak_fraction(options, 1e4) == pytest.approx(flop / 10 / 0.5e12)
