"""The search for what is fastest: every way in which a candidate can go wrong costs that candidate alone."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from detr_profiling.measuring.candidate import Candidate, CandidateError, compared
from detr_profiling.measuring.measurement import Configuration, write_references
from detr_profiling.measuring.switches import Switch, first_guess, switches, value_of, with_value
from detr_profiling.measuring.timing import Timing
from detr_profiling.measuring.turns import Turns
from detr_profiling.tune import TuneOptions, Tuner, main, tune

from detr_fast.config import UserError
from detr_fast.data.shapes import write_split
from detr_fast.training.autotune import typical_size
from detr_fast.training.batch_size import with_batches
from detr_fast.training.build import make_data
from detr_fast.training.recipes import RECIPES
from detr_fast.tuning import Case, Tuning, checked_choices, find

OPTIONS = TuneOptions.of(
    model="detr_tiny", size="32x48", batch_size=1, mode="inference", device="cpu", threads=1, turns=2
)
KINDS = {2: "slow", 3: "wrong", 4: "crashing", 5: "raising", 6: "hanging", 7: "same", 8: "fast"}
"""What a configuration of so many threads is."""
IMPATIENT_S = 1


class Planted(Candidate):
    def __init__(self, configuration: Configuration) -> None:
        self.kind = KINDS.get(configuration.options.runtime.threads or 0, "first")
        command = (sys.executable, str(Path(__file__).with_name("planted_candidate.py")), self.kind)
        super().__init__(configuration, command)

    def time(self, runs: int, limit_s: float, calls: int = 1) -> Timing:
        return super().time(runs, IMPATIENT_S if self.kind == "hanging" else limit_s, calls)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    write_references(compared(first_guess(OPTIONS.workload).options), folder)
    return folder


def test_planted_candidates_are_refused_with_their_reason(references: Path) -> None:
    said: list[str] = []
    tuner = Tuner(OPTIONS, references, said.append, Planted)
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
    assert tuner.choices(turns) == {"threads": 8}
    assert tuner.best.process is None


def test_a_first_guess_that_fails_is_said() -> None:
    tuner = Tuner(OPTIONS.but(threads=4), Path(), new=Planted)
    with pytest.raises(UserError, match="cannot be measured: crashed: SIGSEGV"):
        tuner.search([])


def test_no_time_left() -> None:
    tuner = Tuner(OPTIONS, Path(), new=Planted, ends=time.perf_counter())
    tuner.search([Switch("threads", (8,)), Switch("compile", (True,))])
    assert [(trial.verdict, trial.reason) for trial in tuner.trials] == [("not tried", "no time left")] * 2


def test_a_candidate_that_is_parked_is_built_again() -> None:
    candidate = Candidate(first_guess(OPTIONS.workload))
    try:
        assert candidate.time(2, 600).runs == 2
        candidate.park()
        assert candidate.time(3, 600).runs == 3
    finally:
        candidate.close()
    with pytest.raises(CandidateError, match="attention by xformers"):
        Candidate(with_value(first_guess(OPTIONS.workload), "attention", "xformers")).time(1, 600)


@pytest.mark.parametrize(
    ("best", "candidate", "reason"),
    [
        ([[10, 11], [10, 11]], [[8, 9], [8, 9]], None),
        ([[10, 11], [10, 11]], [[12, 11], [13, 12]], "slower"),
        ([[10, 14], [10, 14]], [[9, 13], [9, 13]], "within the IQR"),
        ([[10, 10], [10, 10]], [[9.95, 9.95], [9.95, 9.95]], "less than 1%"),
        ([[10, 10, 10], [8, 8, 8]], [[6, 6, 6], [9, 9, 9]], "within the IQR"),
        ([[10, 10, 10, 10, 10], [7, 7]], [[5, 5, 5, 5, 5], [8, 8]], "not faster in every turn"),
    ],
)
def test_who_has_won(best: list[list[float]], candidate: list[list[float]], reason: str | None) -> None:
    turns = Turns(*([Timing(tuple(turn)) for turn in side] for side in (best, candidate)))
    found = turns.why_no_gain()
    assert found is None if reason is None else reason in str(found)


def test_only_what_is_left_open_is_tried() -> None:
    assert not switches(OPTIONS.workload.but(kernels="triton", precision="fp32", compile=True, channels_last=True))
    open_ = {switch.name for switch in switches(OPTIONS.workload.but(threads=None))}
    assert {"precision", "optimize", "compile", "channels_last"} <= open_
    assert "threads" not in {switch.name for switch in switches(OPTIONS.workload)}
    assert "precision" not in {switch.name for switch in switches(OPTIONS.workload.but(precision="fp32"))}
    assert {"convolution", "frozen_batch_norm", "dropout"} <= {
        s.name for s in switches(TuneOptions.of(device="cpu", mode="training").workload)
    }
    for switch in switches(TuneOptions.of(device="cpu").workload):
        for value in switch.values:
            changed = with_value(first_guess(OPTIONS.workload), switch.name, value)
            assert value_of(changed, switch.name) == value and checked_choices({switch.name: value})


def test_the_command_writes_what_auto_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr("detr_profiling.tune.switches", lambda options: [Switch("precision", ("fp32",))])
    assert main(OPTIONS.but(minutes=5, output=str(tmp_path / "out"))) == 0
    entry = find(torch.device("cpu"), OPTIONS.case())
    assert entry is not None and [trial.switch for trial in entry.parsed_trials()] == ["precision"]
    assert Tuning.from_dict(json.loads((tmp_path / "out" / "tune.json").read_text())["inference"]) == entry
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Tuning" in report and "Candidates in inference, in turns" in report and "fp32" in report
    (file,) = (tmp_path / "tuned").iterdir()
    assert str(file) in capsys.readouterr().out.replace("\n", "")
    assert json.loads(file.read_text())["first_guess_ms"] > 0


def test_what_is_compiled_or_not_optimised_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_profiling.measuring.switches.choose_precision", lambda *_: (torch.bfloat16, ""))
    monkeypatch.setattr("detr_profiling.workload.choose_device", lambda *_: (torch.device("cuda"), ""))
    inference, training = (first_guess(TuneOptions.of(mode=mode).workload) for mode in ("inference", "training"))
    assert inference.options.runtime.capture and not training.options.runtime.capture
    for switch, value in (("compile", True), ("optimize", False)):
        assert not with_value(inference, switch, value).options.runtime.capture
    assert with_value(with_value(training, "capture", True), "compile", True).options.runtime.capture


class Dying(Planted):
    """The first guess dies at its third turn, as for memory."""

    turns = 0

    def time(self, runs: int, limit_s: float, calls: int = 1) -> Timing:
        if self.kind == "first":
            Dying.turns += 1
            if Dying.turns == 3:
                self.close()
                raise CandidateError("crashed: SIGKILL")
        return super().time(runs, limit_s, calls)


def test_a_best_that_dies_beside_a_candidate_begins_again(references: Path) -> None:
    tuner = Tuner(OPTIONS, references, new=Dying)
    turns = tuner.search([Switch("threads", (7, 8))])
    assert [trial.verdict for trial in tuner.trials] == ["failed", "won"]
    assert "does not run beside it: crashed: SIGKILL" in tuner.trials[0].reason
    assert tuner.choices(turns) == {"threads": 8}


def test_a_batch_that_does_not_fit_is_measured_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def search(self: Tuner, among: list[Switch]) -> Turns:
        asked.append(self.options.workload.batch_size)
        if self.options.workload.batch_size != 4:
            raise UserError("What runs here by default cannot be measured: torch.OutOfMemoryError: CUDA out of memory.")
        return Turns([Timing((2.0, 2.0))], [Timing((2.0, 2.0))])

    monkeypatch.setattr(Tuner, "search", search)
    entry = tune(OPTIONS.but(batch_size=16), lambda line: None)
    assert asked == [16, 8, 4] and entry.case["batch_size"] == 16 and entry.first_guess_ms == 2


def test_a_data_set_says_what_training_would_measure(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 0, 64, 20)
    write_split(tmp_path, "val", 1, 64, 5)
    options = TuneOptions.of(data=str(tmp_path), model="detr_tiny", device="cpu").on_its_data()
    config = RECIPES["tiny"].but(data=str(tmp_path), device="cpu")
    train_set, _, model = make_data(config)
    run = with_batches(config, model, "cpu", 1, len(train_set))
    images, size = run.optimizer.batch_size, typical_size(train_set)
    assert options.case() == Case.of(model, "training", images, *size, options=run.runtime)
    with pytest.raises(UserError, match="--data is for training"):
        TuneOptions.of(data="shapes:64", mode="inference")
