"""The ladder: its rows, the order of its measurements, what it writes. Measuring itself: tests/test_measurement.py."""

import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling import ladder, rounds
from detr_profiling.ladder import LadderOptions, build_entries, measuring
from detr_profiling.measuring.measurement import Configuration, Measurement
from detr_profiling.measuring.row import LadderRow, read_rows, write_rows
from detr_profiling.measuring.techniques import techniques
from detr_profiling.measuring.timing import Timing
from detr_profiling.pages.ladder import ladder_sections, ranks
from detr_profiling.pages.markdown import render_markdown
from detr_profiling.pages.report import make_report
from detr_profiling.pages.results import load_results
from detr_profiling.pages.terminal import show
from detr_profiling.report import readme_table
from detr_profiling.rounds import Entry, rows_of
from detr_profiling.workload import WorkloadOptions

from detr_fast.config import UserError
from detr_fast.console import Console
from tests.planted_clock import PlantedClock

OPTIONS = LadderOptions.of(device="cpu", precision="bf16", size="64x96", runs=2)
QUIET = Console(quiet=True)


def left_one_out(entries: list[Entry]) -> list[Configuration]:
    """Those that are measured besides the entries' own."""
    return [entry.without for entry in entries if isinstance(entry.without, Configuration)]


@dataclass
class Measurer:
    """Stands in for a process: the more is on, the faster. Every measurement is remembered."""

    asked: list[Configuration] = field(default_factory=list)
    broken: str = ""
    broken_backends: dict[str, Any] = field(default_factory=dict)
    wrong_backends: dict[str, Any] = field(default_factory=dict)

    def __call__(self, configuration: Configuration, runs: int, references: Path | None, limit_s: Any) -> Measurement:
        self.asked.append(configuration)
        options, runtime = configuration.options, configuration.options.runtime
        if runtime.precision == self.broken:
            raise UserError("out of memory")
        if configuration.backends.items() & self.broken_backends.items():
            raise UserError("no such kernel")
        ms = 100.0 - 10 * sum(map(bool, (runtime.compile, runtime.channels_last, runtime.precision == "bf16")))
        ms -= sum(value not in ("ref", "scipy") for value in configuration.backends.values())
        timing = Timing(tuple(ms + offset for offset in range(runs)))
        close = not configuration.backends.items() & self.wrong_backends.items()
        error = {"error": 1e-3, "allowed": 2e-3, "quantity": "logits", "close": close} if references else {}
        error["padding"] = 1.04 if options.mix.buckets else 1.5
        return Measurement(timing, 1000.0, 0.1, None, 3.0, **error)


@pytest.fixture(autouse=True)
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor is: with AMX, attention in bfloat16 is torch's own."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)


@pytest.fixture
def measurer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measurer]:
    stand_in = Measurer()
    monkeypatch.setattr(rounds, "measure_in_process", stand_in)
    monkeypatch.setattr(rounds, "write_references_in_process", lambda *_: None)
    yield stand_in


def test_each_row_adds_one_technique_and_the_last_has_what_was_asked_for() -> None:
    entries = build_entries(OPTIONS)
    names = ["reference", "freed memory kept", "joint loss, fused AdamW", "bf16", "channels-last"]
    operations = ["frozen batch norm: folded", "convolution: onednn", "residual stage: onednn"]
    operations += ["attention: sdpa", "attention: blocked", "dropout: pcg64"]
    assert [entry.name for entry in entries] == [*names, *operations, "compile"]
    assert [entry.configuration.options.runtime.host_allocator for entry in entries] == ["system"] + ["keep"] * 11
    first, top = entries[0].configuration, entries[-1].configuration
    assert not first.options.runtime.compile
    assert first.implementation == "reference" and first.options.runtime.precision == "fp32"
    assert top.implementation == "detr_fast" and top.options.runtime.compile and top.options.runtime.channels_last
    assert top.options.runtime.precision == "bf16" and top.backends["attention"] == "blocked"
    assert all(Configuration.from_dict(entry.configuration.to_dict()) == entry.configuration for entry in entries)
    assert all(a.configuration != b.configuration for a, b in itertools.pairwise(entries))


def test_inference_ends_with_weights_that_are_folded_and_rounded_once() -> None:
    eager = OPTIONS.but(mode="inference", compile=False)
    *_, folded, packed, sdpa, blocked = [entry.name for entry in build_entries(eager)]
    assert (folded, packed) == ("weights folded and rounded once", "packed convolution: onednn")
    assert (sdpa, blocked) == ("attention: sdpa", "attention: blocked"), "dropout is of training"


def test_what_a_later_row_replaces_is_not_left_out() -> None:
    """Without torch's attention ours stays on: there is nothing to measure."""
    entries = {entry.name: entry for entry in build_entries(OPTIONS.but(compile=False))}
    assert entries["attention: sdpa"].without is None
    without = entries["attention: blocked"].without
    assert isinstance(without, Configuration) and without.backends["attention"] == "sdpa"


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_model_has_rows_of_its_own_operations_alone(mode: Any) -> None:
    """detr_tiny's batch norm is live and its backbone is none of ours to fuse; it has no dropout."""
    entries = build_entries(OPTIONS.but(model="detr_tiny", mode=mode, compile=False))
    assert [entry.name for entry in entries if ":" in entry.name] == ["attention: sdpa", "attention: blocked"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with all there is, as far as the ladder asks."""
    names = {"choose_device": (torch.device("cuda"), ""), "choose_precision": (torch.bfloat16, "")}
    for name, answer in names.items():
        monkeypatch.setattr(f"detr_profiling.measuring.runnable.{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr("detr_kernels.launch.INTERPRETED", False)
    monkeypatch.setattr("detr_kernels.attention.xformers.why_not_xformers", lambda: None)


def test_on_a_gpu_each_kernel_has_a_row(gpu: None) -> None:
    training, inference = (
        {each.name: each for each in techniques(OPTIONS.workload.but(mode=mode, compile=False))}
        for mode in ("training", "inference")
    )
    folding = [f"frozen batch norm: {backend}" for backend in ("folded", "foreach")]
    convolutions = ["convolution: triton", "convolution: cudnn"]
    attention = [f"attention: {backend}" for backend in ("sdpa", "triton", "xformers")]
    losses = ["match cost: triton", "assignment: triton", "set loss: triton"]
    both = ["preprocessing: triton", *folding, *convolutions]
    assert list(training)[-13:] == [*both, *attention, "layer norm: triton", *losses, "captured step"]
    folded_once = "weights folded and rounded once"
    assert list(inference)[-11:] == [*both, folded_once, *attention, "layer norm: triton", "captured inference"]
    assert training["set loss: triton"].backends == {"set_loss": "triton"}
    ours = [each.name for each in techniques(OPTIONS.workload.but(kernels="triton", compile=False))]
    assert not {"attention: xformers", "convolution: cudnn"} & set(ours) and "attention: triton" in ours
    plain = [each.name for each in techniques(OPTIONS.workload.but(kernels="ref", compile=False))]
    assert not [name for name in plain if ":" in name]


def test_what_does_not_run_is_left_out_of_the_rows_after_it(
    gpu: None, measurer: Measurer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkloadOptions, "resolved", lambda self: self)
    options = OPTIONS.but(compile=False)
    entries = build_entries(options)
    measurer.broken_backends, measurer.wrong_backends = {"layer_norm": "triton"}, {"preprocessing": "triton"}
    list(measuring(entries, options, QUIET).run())
    found = {entry.name: entry for entry in entries}
    broken, wrong = found["layer norm: triton"], found["preprocessing: triton"]
    assert broken.measured is None and broken.note == "no such kernel; left out of the rows after it"
    assert wrong.measured and wrong.note == "NOT close; left out of the rows after it"
    top = entries[-1]
    assert top.configuration.backends["layer_norm"] == top.configuration.backends["preprocessing"] == "ref"
    assert top.configuration.backends["set_loss"] == "triton" and top.configuration.options.runtime.capture
    others = [entry for entry in entries if entry not in (broken, wrong)]
    assert all(entry.measured and entry.measured.timing.runs == 4 and not entry.note for entry in others)
    assert top.measured_without == entries[-2].measured and broken.without is wrong.without is None
    assert all(each.backends["preprocessing"] == "ref" for each in left_one_out(entries))
    backends = [each.backends for each in measurer.asked]
    assert sum(each.get("layer_norm") == "triton" for each in backends) == 1, "it is not tried again"


def test_where_sizes_are_mixed_the_first_technique_is_buckets() -> None:
    mixed = OPTIONS.but(size_mix="mixed")
    entries = build_entries(mixed)
    assert [entry.name for entry in entries[:3]] == ["reference", "buckets", "freed memory kept"]
    assert [entry.configuration.options.mix.buckets for entry in entries] == [False] + [True] * (len(entries) - 1)
    assert entries[1].configuration.implementation == "reference"
    rest = entries[1].without
    assert isinstance(rest, Configuration) and not rest.options.mix.buckets
    assert rest.options.but(buckets=True) == entries[-1].configuration.options
    for options in (OPTIONS, mixed.but(buckets=False)):
        assert "buckets" not in [entry.name for entry in build_entries(options)]


def test_rows_that_change_places_share_one() -> None:
    def row(technique: str, *rounds_ms: float) -> LadderRow:
        return LadderRow("training", technique, rounds_ms=rounds_ms)

    rows = [row("a", 9, 8), row("b", 5, 6), row("c", 6, 5), row("d", 2, 1), LadderRow("training", "not measured")]
    assert ranks(rows) == {"d": 1, "b": 2, "c": 2, "a": 4}


def test_without_a_technique_everything_else_is_on() -> None:
    entries = build_entries(OPTIONS)
    without = {entry.name: entry.without for entry in entries}
    assert without["reference"] is without["joint loss, fused AdamW"] is None  # there is no top without them
    assert without["compile"] is entries[-2]
    plain = {"bf16": ("precision", "fp32"), "channels-last": ("channels_last", False)}
    plain["freed memory kept"] = ("host_allocator", "system")
    for name, (only, value) in plain.items():
        rest, top = without[name], build_entries(OPTIONS)[-1].configuration
        assert isinstance(rest, Configuration) and rest.backends == top.backends
        assert rest.options.to_dict()[only] == value
        assert rest.options.but(**{only: top.options.to_dict()[only]}) == top.options


def test_options_lower_the_top() -> None:
    options = OPTIONS.but(precision="fp32", channels_last=False, attention="ref", kernels="ref", compile=False)
    assert [entry.name for entry in build_entries(options)] == [
        "reference",
        "freed memory kept",
        "joint loss, fused AdamW",
    ]
    without_allocator = build_entries(options.but(host_allocator="system"))
    assert [entry.name for entry in without_allocator] == ["reference", "joint loss, fused AdamW"]


def test_rows_take_turns(measurer: Measurer) -> None:
    entries = build_entries(OPTIONS)
    list(measuring(entries, OPTIONS, QUIET).run())
    one_round = [entry.configuration for entry in entries] + left_one_out(entries)
    assert measurer.asked == one_round * 2
    assert all(entry.measured and entry.measured.timing.runs == 4 for entry in entries)
    assert entries[-1].measured_without == entries[-2].measured


def test_what_does_not_run_says_why_and_the_rest_goes_on(measurer: Measurer) -> None:
    measurer.broken = "fp32"
    entries = build_entries(OPTIONS)
    list(measuring(entries, OPTIONS, QUIET).run())
    assert entries[0].measured is None and entries[0].note == "out of memory"
    assert entries[3].measured and entries[3].measured_without is None and entries[3].note == "out of memory"
    row = rows_of(entries)[3]
    assert row.speedup is None and row.note == "out of memory"


def test_no_measurement_starts_that_would_end_too_late(measurer: Measurer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a minute: in three and a half the fourth would not end."""
    clock = PlantedClock()
    monkeypatch.setattr(rounds, "time", clock)
    monkeypatch.setattr(rounds, "measure_in_process", lambda *order: (clock.sleep(60), measurer(*order))[1])
    entries = build_entries(OPTIONS)
    list(measuring(entries, OPTIONS.but(minutes=3.5), QUIET).run())
    assert [entry.configuration for entry in entries[:3]] == measurer.asked
    assert all("no time" in entry.note for entry in entries), "the first three are not measured a second time"


def test_what_is_measured_is_in_the_file_before_the_ladder_ends(
    measurer: Measurer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any) -> Measurement:
        if len(measurer.asked) == 3:
            raise KeyboardInterrupt
        return measurer(*arguments)

    monkeypatch.setattr(rounds, "measure_in_process", stopped)
    with pytest.raises(KeyboardInterrupt):
        ladder.main(OPTIONS.but(output=str(tmp_path)))
    assert [bool(row.median_ms) for row in read_rows(tmp_path / "ladder.csv")] == [True] * 3 + [False] * 9


def test_rows_go_to_a_file_and_back_and_another_mode_stays(measurer: Measurer, tmp_path: Path) -> None:
    for mode in ("training", "inference", "training"):
        assert ladder.main(OPTIONS.but(rounds=1, mode=mode, output=str(tmp_path))) == 0
    rows = read_rows(tmp_path / "ladder.csv")
    assert [row.mode for row in rows] == ["inference"] * 12 + ["training"] * 12
    last = rows[-1]
    assert last.median_ms and last.without_median_ms and last.without_median_ms > last.median_ms
    assert last.speedup == pytest.approx(100.5 / last.median_ms, rel=1e-4) and last.rounds_ms == (last.median_ms,)
    assert last.images_per_second == pytest.approx(1e3 / last.median_ms, rel=1e-4)
    assert last.energy_j_per_image is None and last.torch == torch.__version__.partition("+")[0]


def test_a_row_is_the_same_after_a_file(tmp_path: Path) -> None:
    """Every field, so that none is written under one name and read under another."""
    row = LadderRow(**{each.name: FILLED.get(each.type, 'text, and "more"') for each in fields(LadderRow)})
    write_rows([row, LadderRow("training", "empty")], tmp_path / "rows.csv")
    assert read_rows(tmp_path / "rows.csv") == [row, LadderRow("training", "empty")]
    assert "round_medians_ms" in (tmp_path / "rows.csv").read_text(), "as in files of before"


FILLED: dict[Any, Any] = {float | None: 2.5, bool | None: False, tuple[float, ...]: (1.5, 2.0)}


def test_a_row_of_mixed_sizes_says_so_and_how_much_is_padding(measurer: Measurer, tmp_path: Path) -> None:
    options = OPTIONS.but(size_mix="mixed", rounds=1, leave_one_out=False)
    entries = build_entries(options)
    list(measuring(entries, options, QUIET).run())
    write_rows(rows_of(entries), tmp_path / "ladder.csv")
    rows = read_rows(tmp_path / "ladder.csv")
    assert [row.padding for row in rows] == [1.5] + [1.04] * (len(rows) - 1)
    assert {row.size_mix for row in rows} == {"mixed"}
    results = load_results(tmp_path)
    shown = Console(width=100, record=True, file=io.StringIO())
    show(ladder_sections(results.ladder), shown)
    assert re.search(r"overhead,(.*\n){1,3}.*reference.* 50 .*\n.*buckets.* 4\.0 ", shown.export_text())
    assert [row.padding for row in results.ladder[:2]] == [1.5, 1.04]
    assert "64x96 px, mixed sizes, batch size 1" in readme_table(results)
    assert f"ladder --output {tmp_path} --size 64x96 --size-mix mixed" in render_markdown(make_report(results))
