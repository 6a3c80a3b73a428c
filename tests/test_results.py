"""Results read back from disk, and their numbers as text."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from detr_profiling.pages import formats
from detr_profiling.pages.report import make_report
from detr_profiling.pages.results import load_results
from detr_profiling.report import ReportOptions, main

from detr_fast.config import UserError

COMMITTED = Path(__file__).parents[1] / "benchmarks/results"
TRACE_WITHOUT_RANGES: dict[str, Any] = {"machine": {}, "workload": {}, "idle_fraction": None, "steps": 2}


def test_ladder_rows(tmp_path: Path) -> None:
    head = "mode,technique,note,median_ms,runs,close,error,round_medians_ms,device,later"
    lines = ("training,reference,,912.4,10,True,nan,905 921,a GPU,x", "training,compile,no time left,,,,,,a GPU,x")
    (tmp_path / "ladder.csv").write_text("\n".join((head, *lines, "training,cut o")))
    reference, unmeasured, cut_off = load_results(tmp_path).ladder
    assert (reference.median_ms, reference.runs, reference.close, reference.error) == (912.4, 10, True, None)
    assert reference.rounds_ms == (905, 921) and dict(reference.conditions) == {"device": "a GPU"}
    assert (unmeasured.median_ms, unmeasured.close, unmeasured.note) == (None, None, "no time left")
    assert cut_off.technique == "cut o" and cut_off.conditions == ()


def test_whatever_is_there(tmp_path: Path) -> None:
    results = load_results(tmp_path)
    assert (results.trace, results.parity, results.ladder) == (None, None, ())
    (tmp_path / "parity.json").write_text('{"close": true}')
    assert load_results(tmp_path).parity == {"close": True}


@pytest.mark.parametrize("folder", [path.parent for path in COMMITTED.rglob("report.md")], ids=lambda path: path.name)
def test_committed_results_are_still_readable(folder: Path) -> None:
    results = load_results(folder)
    titles = [section.title for section in make_report(results).sections]
    assert ("Profiler ranges" in titles) == (results.trace is not None)
    assert not (folder / "tune.json").exists() or "Tuning" in titles


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trace.json", '{"machine": '),  # of a run that was killed while it wrote
        ("parity.json", "[]"),
        ("trace.json", json.dumps(TRACE_WITHOUT_RANGES)),  # of another version
        ("parity.json", json.dumps({"machine": {}, "workload": {}})),
        ("ladder.csv", "mode,technique,median_ms\ntraining,reference,fast\n"),
        ("ladder.csv", "technique,median_ms\nreference,3\n"),
        ("ladder.csv", b"mode,technique\ntraining,\xff\n"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    command = name.partition(".")[0]
    with pytest.raises(UserError, match=rf"{name} cannot be used: .*python -m detr_profiling {command} --output"):
        main(ReportOptions(str(tmp_path)))


def test_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        main(ReportOptions(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (math.nan, "n/a"),
        (math.inf, "n/a"),
        (0.0, "0"),
        (912.4, "912"),
        (1234567.8, "1,234,568"),
        (99.96, "100.0"),
        (41.04, "41.0"),
        (-1.5, "-1.50"),
        (0.0123456, "0.0123"),
        (0.00099999, "1.00e-3"),
        (3.14e-12, "3.14e-12"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert formats.number(value) == text


def test_counts_and_timings() -> None:
    assert [formats.count(value) for value in (1432.0, 2.5, 0, None)] == ["1,432", "2.50", "0", "n/a"]
    assert formats.timing(302.2, 296.1, 307.3, 5) == "302 (11, 5 runs)"
    assert formats.timing(302.2, 296.1, 307.3, 1, "ms") == "302 ms (11, 1 run)"
    assert formats.timing(302.2, None, None, None, "ms") == "302 ms"
    assert formats.timing(None, None, None, None, "ms") == "n/a"
    assert [formats.signed_percent(each) for each in (-0.254, 0.0251, 0)] == ["−25 %", "+2.5 %", "+0 %"]


@pytest.mark.parametrize("parts", [[1 / 3] * 3, [1 / 7] * 7, [0.5004, 0.4996], [0.99951, 0.00049]])
def test_parts_of_a_whole_add_up(parts: list[float]) -> None:
    shown = [float(text) for text in formats.percents(parts)]
    assert round(sum(shown), 6) == 100
    assert all(abs(each - 100 * part) < 0.1 for each, part in zip(shown, parts, strict=True))


def test_parts_that_are_no_whole_are_not_made_one() -> None:
    assert formats.percents([0.5, 0.4]) == ["50.0", "40.0"]
    assert formats.percents([0.5, None]) == ["50.0", "n/a"]
