"""The ladder: its rows, the order of its measurements, what it writes. Measuring itself: tests/test_measurement.py."""

import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling import ladder
from detr_profiling.ladder import LadderOptions, build_rungs, measure_rungs, read_rows, rows_of
from detr_profiling.measuring.measurement import Configuration, Measurement
from detr_profiling.measuring.techniques import techniques
from detr_profiling.measuring.timing import Timing
from detr_profiling.pages.ladder import ranks
from detr_profiling.pages.results import LadderRow, load_results
from detr_profiling.report import readme_table, render_markdown
from rich.console import Console

from detr_fast.config import UserError
from tests.planted_clock import PlantedClock

OPTIONS = LadderOptions(device="cpu", precision="bf16", size="64x96", runs=2)
QUIET = Console(quiet=True)


@dataclass
class Measurer:
    """Stands in for a process: the more is on, the faster. Every measurement is remembered."""

    asked: list[Configuration] = field(default_factory=list)
    broken: str = ""
    broken_forms: dict[str, Any] = field(default_factory=dict)
    wrong_forms: dict[str, Any] = field(default_factory=dict)

    def __call__(self, configuration: Configuration, runs: int, oracle: Path | None, limit_s: object) -> Measurement:
        self.asked.append(configuration)
        options = configuration.options
        if options.precision == self.broken:
            raise UserError("out of memory")
        if configuration.forms.items() & self.broken_forms.items():
            raise UserError("no such kernel")
        ms = 100.0 - 10 * sum((options.compile, options.channels_last, options.precision == "bf16"))
        ms -= sum(value not in ("ref", False, "scipy") for value in configuration.forms.values())
        timing = Timing(tuple(ms + offset for offset in range(runs)))
        close = not configuration.forms.items() & self.wrong_forms.items()
        error = {"error": 1e-3, "allowed": 2e-3, "quantity": "logits", "close": close} if oracle else {}
        error["padding"] = 1.04 if options.buckets else 1.5
        return Measurement(timing, 1000.0, 0.1, None, 3.0, **error)  # type: ignore[arg-type]


@pytest.fixture
def measurer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurer]:
    stand_in = Measurer()
    monkeypatch.setattr(ladder, "measure_in_process", stand_in)
    monkeypatch.setattr(ladder, "write_oracle_in_process", lambda *_: None)
    yield stand_in


def test_each_row_adds_one_technique_and_the_last_has_what_was_asked_for() -> None:
    rungs = build_rungs(OPTIONS)
    names = ["reference", "freed memory kept", "losses at once", "bf16", "channels-last", "attention with dropout"]
    assert [rung.technique for rung in rungs] == [*names, "folded batch norm", "convolutions by oneDNN", "compile"]
    assert [rung.configuration.keeps_memory for rung in rungs] == [False] + [True] * 8
    first, top = rungs[0].configuration, rungs[-1].configuration
    assert first.implementation == "reference" and first.options.precision == "fp32" and not first.options.compile
    assert top.implementation == "detr_fast" and top.options.compile and top.options.channels_last
    assert top.options.precision == "bf16" and top.forms["folded"] and top.forms["attention"] == "sdpa"
    assert all(Configuration.from_dict(rung.configuration.to_dict()) == rung.configuration for rung in rungs)
    assert all(a.configuration != b.configuration for a, b in itertools.pairwise(rungs))


def test_inference_ends_with_weights_that_are_folded_and_rounded_once() -> None:
    names = [rung.technique for rung in build_rungs(replace(OPTIONS, mode="inference"))]
    assert names[-5:] == ["SDPA", "folded batch norm", "convolutions by oneDNN", "frozen weights", "compile"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with all there is, as far as the ladder asks."""
    names = {"choose_device": (torch.device("cuda"), ""), "choose_precision": (torch.bfloat16, "")}
    for name, answer in (names | {"why_not_triton": None, "why_not_xformers": None}).items():
        monkeypatch.setattr(f"detr_profiling.measuring.techniques.{name}", lambda *_, answer=answer: answer)


def test_on_a_gpu_each_kernel_has_a_row(gpu: None) -> None:
    training, inference = (
        {each.name: each for each in techniques(replace(OPTIONS, mode=mode, compile=False))}
        for mode in ("training", "inference")
    )
    attention = ["packed attention by triton", "packed attention by xformers"]
    convolutions = ["convolutions by triton", "convolutions by cuDNN"]
    kernels = ["layer norm by triton", "pixels by triton"]
    losses = ["match cost by triton", "set loss by triton", "assignment by triton"]
    assert list(training)[-10:] == [*attention, *kernels, *losses, *convolutions, "captured step"]
    assert list(inference)[-7:] == [*attention, *kernels, *convolutions, "captured inference"]
    assert training["set loss by triton"].forms == {"set_loss": "triton"}
    ours = [each.name for each in techniques(replace(OPTIONS, kernels="triton", compile=False))]
    assert not {"packed attention by xformers", "convolutions by cuDNN"} & set(ours)


def test_what_does_not_run_is_left_out_of_the_rows_after_it(
    gpu: None, measurer: Measurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LadderOptions, "resolved", lambda self: self)
    options = replace(OPTIONS, compile=False)
    rungs = build_rungs(options)
    measurer.broken_forms, measurer.wrong_forms = {"layer_norm": "triton"}, {"pixels": "triton"}
    list(measure_rungs(rungs, options, QUIET))
    found = {rung.technique: rung for rung in rungs}
    broken, wrong = found["layer norm by triton"], found["pixels by triton"]
    assert broken.measured is None and broken.note == "no such kernel; left out of the rows after it"
    assert wrong.measured and wrong.note == "NOT close; left out of the rows after it"
    top = rungs[-1]
    assert top.configuration.forms["layer_norm"] == top.configuration.forms["pixels"] == "ref"
    assert top.configuration.forms["set_loss"] == "triton" and top.configuration.options.capture
    others = [rung for rung in rungs if rung not in (broken, wrong)]
    assert all(rung.measured and rung.measured.timing.runs == 4 and not rung.note for rung in others)
    assert top.measured_without == rungs[-2].measured and broken.without is wrong.without is None
    assert all(rung.without.forms["pixels"] == "ref" for rung in rungs if rung.without)
    forms = [each.forms for each in measurer.asked]
    assert sum(each.get("layer_norm") == "triton" for each in forms) == 1, "it is not tried again"


def test_where_sizes_are_mixed_the_first_technique_is_buckets() -> None:
    mixed = replace(OPTIONS, sizes="mixed")
    rungs = build_rungs(mixed)
    assert [rung.technique for rung in rungs[:3]] == ["reference", "buckets", "freed memory kept"]
    assert [rung.configuration.options.buckets for rung in rungs] == [False] + [True] * (len(rungs) - 1)
    assert rungs[1].configuration.implementation == "reference"
    assert rungs[1].without and not rungs[1].without.options.buckets
    assert replace(rungs[1].without.options, buckets=True) == rungs[-1].configuration.options
    for options in (OPTIONS, replace(mixed, buckets=False)):
        assert "buckets" not in [rung.technique for rung in build_rungs(options)]


def test_rows_that_change_places_share_one() -> None:
    def row(technique: str, *rounds_ms: float) -> LadderRow:
        return LadderRow("training", technique, rounds_ms=rounds_ms)

    rows = [row("a", 9, 8), row("b", 5, 6), row("c", 6, 5), row("d", 2, 1), LadderRow("training", "not measured")]
    assert ranks(rows) == {"d": 1, "b": 2, "c": 2, "a": 4}


def test_without_a_technique_everything_else_is_on() -> None:
    without = {rung.technique: rung.without for rung in build_rungs(OPTIONS)}
    assert without["reference"] is without["losses at once"] is None  # there is no top without them
    assert without["freed memory kept"] is None  # ours always keeps it
    assert without["compile"] is None  # the row before
    for name, only in {"bf16": "precision", "channels-last": "channels_last"}.items():
        rest, top = without[name], build_rungs(OPTIONS)[-1].configuration
        assert rest is not None and rest.forms == top.forms and getattr(rest.options, only) in ("fp32", False)
        assert replace(rest.options, **{only: getattr(top.options, only)}) == top.options


def test_options_lower_the_top() -> None:
    options = replace(OPTIONS, precision="fp32", channels_last=False, attention="ref", kernels="ref", compile=False)
    assert [rung.technique for rung in build_rungs(options)] == ["reference", "freed memory kept", "losses at once"]


def test_rows_take_turns(measurer: Measurer) -> None:
    rungs = build_rungs(OPTIONS)
    list(measure_rungs(rungs, OPTIONS, QUIET))
    one_round = [rung.configuration for rung in rungs] + [rung.without for rung in rungs if rung.without]
    assert measurer.asked == one_round * 2
    assert all(rung.measured and rung.measured.timing.runs == 4 for rung in rungs)
    assert rungs[-1].measured_without == rungs[-2].measured


def test_what_does_not_run_says_why_and_the_rest_goes_on(measurer: Measurer) -> None:
    measurer.broken = "fp32"
    rungs = build_rungs(OPTIONS)
    list(measure_rungs(rungs, OPTIONS, QUIET))
    assert rungs[0].measured is None and rungs[0].note == "out of memory"
    assert rungs[3].measured and rungs[3].measured_without is None and rungs[3].note == "out of memory"
    row = rows_of(rungs, OPTIONS)[3]
    assert row["speedup"] is None and row["note"] == "out of memory"


def test_no_measurement_starts_that_would_end_too_late(measurer: Measurer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a minute: in three and a half the fourth would not end."""
    clock = PlantedClock()
    monkeypatch.setattr(ladder, "time", clock)
    monkeypatch.setattr(ladder, "measure_in_process", lambda *order: (clock.sleep(60), measurer(*order))[1])
    rungs = build_rungs(OPTIONS)
    list(measure_rungs(rungs, replace(OPTIONS, minutes=3.5), QUIET))
    assert [rung.configuration for rung in rungs[:3]] == measurer.asked
    assert all("no time" in rung.note for rung in rungs), "the first three are not measured a second time"


def test_what_is_measured_is_in_the_file_before_the_ladder_ends(
    measurer: Measurer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any) -> Measurement:
        if len(measurer.asked) == 3:
            raise KeyboardInterrupt
        return measurer(*arguments)

    monkeypatch.setattr(ladder, "measure_in_process", stopped)
    with pytest.raises(KeyboardInterrupt):
        ladder.main(replace(OPTIONS, out=str(tmp_path)))
    assert [bool(row["median_ms"]) for row in read_rows(tmp_path / "ladder.csv")] == [True] * 3 + [False] * 6


def test_rows_go_to_a_file_and_back_and_another_mode_stays(measurer: Measurer, tmp_path: Path) -> None:
    path, options = tmp_path / "ladder.csv", replace(OPTIONS, rounds=1)
    for mode in ("training", "inference", "training"):
        rungs = build_rungs(replace(options, mode=mode))
        list(measure_rungs(rungs, options, QUIET))
        ladder.write_rows(rows_of(rungs, replace(options, mode=mode)), path)
    rows = read_rows(path)
    assert [row["mode"] for row in rows] == ["inference"] * 10 + ["training"] * 9
    last = rows[-1]
    assert float(last["speedup"]) == pytest.approx(100.5 / float(last["median_ms"]), rel=1e-4)
    assert float(last["images_per_second"]) == pytest.approx(1e3 / float(last["median_ms"]), rel=1e-4)
    assert last["energy_j_per_image"] == "" and last["torch"] == torch.__version__.partition("+")[0]
    assert float(last["without_median_ms"]) > float(last["median_ms"])


def test_a_row_of_mixed_sizes_says_so_and_how_much_is_padding(measurer: Measurer, tmp_path: Path) -> None:
    options = replace(OPTIONS, sizes="mixed", rounds=1, leave_one_out=False)
    rungs = build_rungs(options)
    list(measure_rungs(rungs, options, QUIET))
    ladder.write_rows(rows_of(rungs, options), tmp_path / "ladder.csv")
    rows = read_rows(tmp_path / "ladder.csv")
    assert [row["padding"] for row in rows] == ["1.5"] + ["1.04"] * (len(rows) - 1)
    assert {row["sizes"] for row in rows} == {"mixed"}
    shown = Console(record=True, width=100, quiet=True, file=io.StringIO())
    shown.quiet = False
    shown.print(ladder.table(rungs))
    assert re.search(r"padding.*\n.*\n.*reference.* 1\.50 .*\n.*buckets.* 1\.04 ", shown.export_text())
    results = load_results(tmp_path)
    assert [row.padding for row in results.ladder[:2]] == [1.5, 1.04]
    assert "64x96 px, mixed sizes, 1 a step" in readme_table(results)
    assert f"ladder --out {tmp_path} --size 64x96 --sizes mixed" in render_markdown(results)
