"""`train --profile N`: a trace of N steps, with what lies between them, and the same numbers."""

import json
from pathlib import Path

import pytest
import torch

from detr_fast.training.profiled_step import WARM_UP_STEPS, ProfiledStep
from detr_fast.training.run_folder import RunFolder

CPU = torch.device("cpu")


def run(folder: RunFolder, calls: int) -> tuple[list[torch.Tensor], list[str]]:
    said: list[str] = []
    step = lambda batches: torch.ones(3).cumsum(0) * len(batches)  # noqa: E731
    with ProfiledStep(step, 2, folder, CPU, said.append) as profiled:
        return [profiled([]) for _ in range(calls)], said


def test_the_steps_after_the_first_are_in_the_trace(tmp_path: Path) -> None:
    results, said = run(RunFolder(tmp_path), 9)
    assert len(results) == 9 and len(said) == 1 and "trace.json" in said[0]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    steps = [name for name in names if name.startswith("ProfilerStep#")]
    assert sorted(steps) == [f"ProfilerStep#{WARM_UP_STEPS + number}" for number in range(2)]
    assert names.count("aten::cumsum") == 2


def test_a_run_that_ends_before_writes_what_there_is(tmp_path: Path) -> None:
    _, said = run(RunFolder(tmp_path), WARM_UP_STEPS + 1)
    assert (tmp_path / "trace.json").is_file() and [line.split(" steps")[0] for line in said] == ["A trace of 1"]


@pytest.mark.parametrize("calls", range(WARM_UP_STEPS + 1))
def test_a_run_without_a_step_to_record_says_so(calls: int, tmp_path: Path) -> None:
    _, said = run(RunFolder(tmp_path), calls)
    assert not (tmp_path / "trace.json").exists() and len(said) == 1 and said[0].startswith("No trace was written")
