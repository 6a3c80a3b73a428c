"""The suite runs its parts in order, each in its time, and what has finished stays whatever happens to the rest."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from detr_profiling import suite
from detr_profiling.ladder import LadderOptions
from detr_profiling.suite import PARTS, Part, SuiteOptions, run_part, workload_arguments
from detr_profiling.tune import TuneOptions
from detr_profiling.workload import WorkloadOptions

from detr_fast.command import refuse_idle, spelled_out
from detr_fast.config import TrainConfig, UserError


def python(name: str, code: str, share: float = 1.0, output: str | None = None) -> Part:
    return Part(name, lambda options, minutes: [sys.executable, "-c", code], share, output)


def test_the_most_important_comes_first() -> None:
    assert [part.name for part in PARTS] == ["kernel tests", "parity", "ladder", "kernel timings", "trace"]


def test_options_reach_the_parts() -> None:
    options = SuiteOptions(size="64x96", compile=False, channels_last=False, kernels="ref", threads=1, dropout=0.0)
    parsed = tyro.cli(WorkloadOptions, args=workload_arguments(options))
    assert parsed.to_dict() == {name: getattr(options, name) for name in parsed.to_dict()}
    assert tyro.cli(WorkloadOptions, args=workload_arguments(SuiteOptions())).compile


def test_compiled_forms_are_measured_but_not_traced() -> None:
    commands = {part.name: part.command(SuiteOptions(), 1.0) for part in PARTS}
    assert [name for name, command in commands.items() if "--compile" in command] == ["parity", "ladder"]
    assert "--no-compile" in commands["trace"]


def test_mixed_sizes_are_climbed_but_not_traced() -> None:
    commands = {part.name: part.command(SuiteOptions(sizes="mixed"), 1.0) for part in PARTS}
    assert "mixed" in commands["ladder"] and "mixed" not in commands["trace"]


LIMIT_S = 12345.0


@pytest.fixture
def time_is_up_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Lets a part's `LIMIT_S` be over as soon as a file has content, however slowly its process starts."""

    def wait_for(file: Path) -> None:
        wait = subprocess.Popen.wait

        def waited(process: subprocess.Popen, timeout: float | None = None) -> int:
            if timeout != LIMIT_S:
                return wait(process, timeout)
            patience_ends = time.monotonic() + PATIENCE_S
            while not (file.exists() and file.read_text()) and time.monotonic() < patience_ends:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(process.args, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", waited)
        monkeypatch.setattr(suite, "SECONDS_TO_END", PATIENCE_S)

    return wait_for


PATIENCE_S = 120


def test_a_part_that_takes_too_long_is_stopped_with_its_children(
    tmp_path: Path, time_is_up_with: Callable[[Path], None]
) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep({PATIENCE_S})"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    time_is_up_with(tmp_path / "pid")
    ended = run_part(python("slow", code, output="slow.txt"), SuiteOptions(out=str(tmp_path)), LIMIT_S)
    assert ended.startswith("stopped after")
    assert (tmp_path / "slow.txt").read_text() == "begun\n"
    child_pid, patience_ends = int((tmp_path / "pid").read_text()), time.monotonic() + PATIENCE_S / 2
    while is_running(child_pid) and time.monotonic() < patience_ends:
        time.sleep(0.01)
    assert not is_running(child_pid)


def test_a_part_that_is_stopped_may_clean_up(tmp_path: Path, time_is_up_with: Callable[[Path], None]) -> None:
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('cleaned'), sys.exit()))\n"
    part = python("tidy", code + f"print('begun', flush=True); time.sleep({PATIENCE_S})", output="tidy.txt")
    time_is_up_with(tmp_path / "tidy.txt")
    assert run_part(part, SuiteOptions(out=str(tmp_path)), LIMIT_S).startswith("stopped after")
    assert (tmp_path / "tidy.txt").read_text() == "begun\ncleaned\n"


def is_running(pid: int) -> bool:
    """A process that has ended may stay in the table until its new parent asks for it."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_part_that_fails_is_told_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (python("first", "raise SystemExit(3)"), python("second", "print('here')", output="second.txt"))
    monkeypatch.setattr(suite, "PARTS", parts)
    assert suite.main(SuiteOptions(out=str(tmp_path))) == 1
    shown = capsys.readouterr().out
    assert "first: exit code 3" in shown and "second: done" in shown
    assert (tmp_path / "second.txt").read_text() == "here\n" and (tmp_path / "report.html").exists()


def test_a_part_without_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "PARTS", (python("never", "raise SystemExit(3)"),))
    assert suite.main(replace(SuiteOptions(out=str(tmp_path)), minutes=0.1)) == 0
    assert "left out" in capsys.readouterr().out


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="--minutes"):
        SuiteOptions(minutes=0)


@pytest.mark.parametrize("call", ["correctness", "speed", "training"])
def test_the_calls_for_a_gpu_can_be_typed(call: str, tmp_path: Path) -> None:
    """Their files exist, their options are known, and their time is four minutes."""
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    environment = os.environ | {"PYTHON": "echo", "OUT": str(tmp_path)}
    done = subprocess.run([script, call], env=environment, capture_output=True, text=True)
    lines = [path.read_text().split() for path in tmp_path.glob("*.txt")]
    assert done.stdout.count("exit code 0") == len(lines) >= 2
    for module, *words in (words[1:] for words in lines):
        if module == "pytest":
            files = [word for word in words if word.startswith("tests/")]
            assert files and all((script.parents[1] / file).exists() for file in files)
        elif module == "detr_profiling":
            options: Any = {"tune": TuneOptions, "ladder": LadderOptions}[words[0]]
            refuse_idle(tyro.cli(options, args=words[1:]), words)
        else:
            refuse_idle(tyro.cli(TrainConfig, args=list(spelled_out(words, TrainConfig))), words)
    lines_of_call = script.read_text().split(f"\n{call})")[1].split(";;")[0]
    seconds = re.findall(r"^    (?:line|tests|profile) \w+ (\d+)", lines_of_call, re.MULTILINE)
    assert len(seconds) == len(lines) and sum(map(int, seconds)) <= 240
