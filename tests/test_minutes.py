"""--minutes: the schedule ends within them, whatever a step takes, and evaluations are not counted."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detr_fast.options import TrainOptions
from detr_fast.train import main
from detr_fast.training.loop import FIRST_PLAN_STEP, WARM_UP_STEPS, TrainingLoop
from detr_fast.training.optimizer import UNPLANNED_STEPS, Schedule
from detr_fast.training.recipes import RECIPES
from detr_fast.weights.container import read_container

pytestmark = pytest.mark.usefixtures("unrendered")

STEP_S, FIRST_STEP_S, EVALUATION_S = 1.0, 4.0, 500.0
PER_EPOCH = 6


class Clock:
    """Time goes by in steps and evaluations alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slower_after: int = 1 << 30) -> None:
        self.now, self.slower_after = 0.0, slower_after
        monkeypatch.setattr("detr_fast.training.loop.time", SimpleNamespace(perf_counter=lambda: self.now))
        advance, evaluate = TrainingLoop._advance, TrainingLoop._evaluate

        def slow_step(loop: TrainingLoop) -> None:
            advance(loop)
            first = loop.progress.step - loop._first_step <= WARM_UP_STEPS
            self.now += FIRST_STEP_S if first else STEP_S * (1 + (loop.progress.step > self.slower_after))

        def slow_evaluation(loop: TrainingLoop) -> None:
            given = loop.evaluate

            def evaluation() -> Any:
                self.now += EVALUATION_S
                return given()

            loop.evaluate = evaluation
            evaluate(loop)
            loop.evaluate = given

        monkeypatch.setattr(TrainingLoop, "_advance", slow_step)
        monkeypatch.setattr(TrainingLoop, "_evaluate", slow_evaluation)


def options(root: Path, output: Path, **changes: Any) -> TrainOptions:
    small = {"data": str(root), "output": str(output), "minutes": 1.0, "batch_size": 8, "log_every": 1, "eval_every": 3}
    return RECIPES["tiny"].but(**(small | {"device": "cpu", "warmup_steps": 2} | changes))


def rows(output: Path, kind: str) -> list[dict[str, str]]:
    with (output / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


def test_as_many_steps_as_fit(shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    assert main(options(shapes_root, tmp_path)) == 0
    steps = WARM_UP_STEPS + round((60 - WARM_UP_STEPS * FIRST_STEP_S) / STEP_S)
    trained = rows(tmp_path, "train")
    assert len(trained) == steps
    last, middle = float(trained[-1]["lr"]), float(trained[steps // 2]["lr"])
    assert last < 0.01 * middle  # the cosine has come to its end
    evaluated = [float(row["trained_seconds"]) for row in rows(tmp_path, "val")]
    assert evaluated[-1] == pytest.approx(60) and len(evaluated) == 3
    progress = read_container(tmp_path / "checkpoints" / "last.pt")["progress"]
    assert progress["planned_steps"] == steps and progress["trained_seconds"] == pytest.approx(60)
    assert progress["seconds"] == pytest.approx(60 + 3 * EVALUATION_S)


def test_a_pace_that_changes_is_planned_for(shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many steps were planned after the first epoch: from the second on each takes twice as long."""
    Clock(monkeypatch, slower_after=PER_EPOCH)
    assert main(options(shapes_root, tmp_path)) == 0
    (*_, last) = rows(tmp_path, "val")
    assert 55 <= float(last["trained_seconds"]) <= 66
    rates = [float(row["lr"]) for row in rows(tmp_path, "train")]
    assert rates[-1] < 0.05 * max(rates)  # the schedule was not cut off


def test_a_run_goes_on_within_its_minutes(shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stopped = options(shapes_root, tmp_path)
    kept = TrainingLoop._agreed
    monkeypatch.setattr(TrainingLoop, "_agreed", lambda loop, interruption: loop.progress.step == 2 * PER_EPOCH)
    assert main(stopped) != 0
    monkeypatch.setattr(TrainingLoop, "_agreed", kept)
    clock.now = 0.0
    assert main(stopped.but(resume="auto")) == 0
    (*_, last) = rows(tmp_path, "val")
    assert float(last["trained_seconds"]) == pytest.approx(60, abs=STEP_S)
    rates = [float(row["lr"]) for row in rows(tmp_path, "train")]
    before, after = rates[2 * PER_EPOCH - 1 : 2 * PER_EPOCH + 1]
    assert after < before < max(rates)  # where the schedule was, until it is planned anew


def test_a_schedule_over_other_steps() -> None:
    schedule = Schedule("step", 300, 200, 5)
    assert schedule.of(30) == Schedule("step", 30, 20, 5)
    unplanned = Schedule("cosine", 300, 200, 2).of(UNPLANNED_STEPS)
    assert [unplanned.factor(step) for step in (0, 1, FIRST_PLAN_STEP)] == [0.5, 1.0, 1.0]
