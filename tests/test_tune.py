"""The search for what is fastest: every way in which a candidate can go wrong costs that candidate alone."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detr_profiling.measuring.candidate import Candidate, CandidateError, compared
from detr_profiling.measuring.measurement import Configuration, write_oracle
from detr_profiling.measuring.switches import Switch, first_guess, switches, value_of, with_value
from detr_profiling.measuring.timing import Timing
from detr_profiling.measuring.turns import Turns
from detr_profiling.tune import TuneOptions, Tuner, main

from detr_fast.config import UserError
from detr_fast.tuning import Choices, Tuning, find

OPTIONS = TuneOptions(model="detr_tiny", size="32x48", batch_size=1, mode="inference", device="cpu", threads=1, turns=2)
KINDS = {2: "slow", 3: "wrong", 4: "crashing", 5: "raising", 6: "hanging", 7: "same", 8: "fast"}
"""What a configuration of so many threads is."""
IMPATIENT_S = 1


class Planted(Candidate):
    def __init__(self, configuration: Configuration) -> None:
        self.kind = KINDS.get(configuration.options.threads or 0, "first")
        command = (sys.executable, str(Path(__file__).with_name("planted_candidate.py")), self.kind)
        super().__init__(configuration, command)

    def time(self, runs: int, limit_s: float, calls: int = 1) -> Timing:
        return super().time(runs, IMPATIENT_S if self.kind == "hanging" else limit_s, calls)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle")
    write_oracle(compared(first_guess(OPTIONS).options), folder)
    return folder


def test_planted_candidates_are_refused_with_their_reason(oracle: Path) -> None:
    said: list[str] = []
    tuner = Tuner(OPTIONS, oracle, said.append, Planted)
    turns = tuner.search([Switch("threads", tuple(KINDS))])
    outcomes = {KINDS[int(trial.value)]: trial for trial in tuner.trials}
    assert {kind: trial.verdict for kind, trial in outcomes.items()} == {
        "slow": "no faster",
        "wrong": "not close",
        "crashing": "failed",
        "raising": "failed",
        "hanging": "failed",
        "same": "no faster",
        "fast": "won",
    }
    assert outcomes["slow"].reason == "slower"
    assert "errs by" in outcomes["wrong"].reason and (outcomes["wrong"].error or 0) > (outcomes["wrong"].allowed or 0)
    assert outcomes["crashing"].reason == "crashed: SIGSEGV"
    assert "illegal memory access" in outcomes["raising"].reason
    assert outcomes["hanging"].reason == f"hung: no answer within {IMPATIENT_S} s"
    assert outcomes["fast"].error is not None and outcomes["fast"].error <= (outcomes["fast"].allowed or 0)
    assert len(said) == len(KINDS) and all(trial.text() in line for trial, line in zip(tuner.trials, said, strict=True))
    first, found = turns.joined()
    assert found.median_ms < 0.75 * first.median_ms
    assert tuner.choices(turns) == Choices(threads=8)
    assert tuner.best.process is None


def test_a_first_guess_that_fails_is_said() -> None:
    tuner = Tuner(replace(OPTIONS, threads=4), Path(), new=Planted)
    with pytest.raises(UserError, match="first guess cannot be measured: crashed: SIGSEGV"):
        tuner.search([])


def test_no_time_left() -> None:
    tuner = Tuner(replace(OPTIONS, minutes=1e-6), Path(), new=Planted)
    tuner.search([Switch("threads", (8,)), Switch("compile", (True,))])
    assert [(trial.verdict, trial.reason) for trial in tuner.trials] == [("not tried", "no time left")] * 2


def test_a_candidate_that_is_parked_is_built_again() -> None:
    candidate = Candidate(first_guess(OPTIONS))
    try:
        assert candidate.time(2, 120).runs == 2
        candidate.park()
        assert candidate.time(3, 120).runs == 3
    finally:
        candidate.close()
    with pytest.raises(CandidateError, match="attention by xformers"):
        Candidate(with_value(first_guess(OPTIONS), "attention", "xformers")).time(1, 120)


@pytest.mark.parametrize(
    ("best", "candidate", "reason"),
    [
        ([[10, 11], [10, 11]], [[8, 9], [8, 9]], None),
        ([[10, 11], [10, 11]], [[12, 11], [13, 12]], "slower"),
        ([[10, 14], [10, 14]], [[9, 13], [9, 13]], "within the spread"),
        ([[10, 10], [10, 10]], [[9.95, 9.95], [9.95, 9.95]], "less than 1%"),
        ([[10, 10, 10], [8, 8, 8]], [[6, 6, 6], [9, 9, 9]], "within the spread"),
        ([[10, 10, 10, 10, 10], [7, 7]], [[5, 5, 5, 5, 5], [8, 8]], "not faster in every turn"),
    ],
)
def test_who_has_won(best: list[list[float]], candidate: list[list[float]], reason: str | None) -> None:
    turns = Turns(*([Timing(tuple(turn)) for turn in side] for side in (best, candidate)))
    found = turns.why_no_gain()
    assert found is None if reason is None else reason in str(found)


def test_only_what_is_left_open_is_tried() -> None:
    open_ = {switch.name for switch in switches(replace(OPTIONS, threads=None))}
    assert {"precision", "frozen", "compile", "channels_last"} <= open_
    assert "threads" not in {switch.name for switch in switches(OPTIONS)}
    assert "precision" not in {switch.name for switch in switches(replace(OPTIONS, precision="fp32"))}
    assert {"convolution", "folded"} <= {s.name for s in switches(TuneOptions(device="cpu", mode="training"))}
    for switch in switches(TuneOptions(device="cpu")):
        for value in switch.values:
            changed = with_value(first_guess(OPTIONS), switch.name, value)
            assert value_of(changed, switch.name) == value and Choices.from_dict({switch.name: value})


def test_the_command_writes_what_auto_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr("detr_profiling.tune.switches", lambda options: [Switch("precision", ("fp32",))])
    assert main(replace(OPTIONS, minutes=5, out=str(tmp_path / "out"))) == 0
    entry = find(torch.device("cpu"), OPTIONS.case())
    assert entry is not None and [trial.switch for trial in entry.parsed_trials()] == ["precision"]
    assert Tuning.from_dict(json.loads((tmp_path / "out" / "tune.json").read_text())["inference"]) == entry
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Fastest here" in report and "Candidates in inference, in turns" in report and "fp32" in report
    (file,) = (tmp_path / "tuned").iterdir()
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    assert json.loads(file.read_text())["first_guess_ms"] > 0
