"""The calls that scripts make: `make report` and `benchmarks/gpu.sh` give options that there are, and end in time."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from detr_profiling.ladder import LadderOptions
from detr_profiling.parity import ParityOptions
from detr_profiling.report import ReportOptions
from detr_profiling.trace import TraceOptions
from detr_profiling.tune import TuneOptions

from detr_fast.command import parsed
from detr_fast.options import TrainOptions

CHECKOUT = Path(__file__).parents[1]
TIMEOUT = """#!/bin/sh
shift 2
echo "$1 s" >>times
[ "$5" = "$OVERRUNS" ] && exit 124
shift
exec "$@"
"""
"""Stands in for `timeout --foreground --kill-after=10 SECONDS COMMAND`; the part OVERRUNS takes too long."""
PYTHON = """#!/bin/sh
echo "$*" >>calls
[ "$3" != "$FAILS" ]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(CHECKOUT / "Makefile", tmp_path)
    scripts = {"setup.sh": "#!/bin/sh\n", "timeout": TIMEOUT, ".venv/bin/python": PYTHON}
    for name, script in scripts.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make_report(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{checkout}:{os.environ['PATH']}", "FAILS": "", "OVERRUNS": ""} | variables
    command = ["make", "report", "ARGS=--size 64x96 --batch-size 2", "OUT=some folder"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def test_make_report_gives_each_part_its_options_and_time(checkout: Path) -> None:
    assert make_report(checkout).returncode == 0
    calls = [
        line.replace("some folder", "folder").split()[2:] for line in (checkout / "calls").read_text().splitlines()
    ]
    kinds = {"parity": ParityOptions, "ladder": LadderOptions, "trace": TraceOptions, "report": ReportOptions}
    assert [call[0] for call in calls] == list(kinds), "what is most important comes first"
    for name, *words in calls:
        options: Any = parsed(kinds[name], words)
        found = options.to_dict()
        assert found["output"] == "folder"
        assert name == "report" or (found["size"], found["batch_size"]) == ("64x96", 2)
    seconds = re.findall(r"(\d+) s", (checkout / "times").read_text())
    assert len(seconds) == 3 and sum(map(int, seconds)) <= 8 * 60


@pytest.mark.parametrize("variables", [{"FAILS": "parity"}, {"OVERRUNS": "parity"}])
def test_a_part_of_make_report_that_fails_or_overruns_keeps_no_other_from_running(
    checkout: Path, variables: dict[str, str]
) -> None:
    done = make_report(checkout, **variables)
    assert (done.returncode != 0) == ("FAILS" in variables)
    assert ("parity: stopped after 150 s" in done.stdout) == ("OVERRUNS" in variables)
    calls = (checkout / "calls").read_text()
    assert all(f"detr_profiling {name} " in calls for name in ("ladder", "trace", "report"))


@pytest.mark.parametrize("call", ["correctness", "speed", "training"])
def test_the_calls_for_a_gpu_can_be_typed(call: str, tmp_path: Path) -> None:
    """Their files exist, their options are known, and their time is four minutes."""
    script = CHECKOUT / "benchmarks" / "gpu.sh"
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
            parsed(options, words[1:])
        else:
            parsed(TrainOptions, words)
    lines_of_call = script.read_text().split(f"\n{call})")[1].split(";;")[0]
    seconds = re.findall(r"^    (?:line|tests|profile) \w+ (\d+)", lines_of_call, re.MULTILINE)
    assert len(seconds) == len(lines) and sum(map(int, seconds)) <= 240
