"""Stopping a process: what it started ends with it, and it may clean up first."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from detr_profiling.measuring import stopping
from detr_profiling.measuring.stopping import stop

PATIENCE_S = 120


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SECONDS_TO_END", PATIENCE_S)


def started(code: str, until: Path) -> subprocess.Popen:
    """Start `code` and wait until it has written `until`, however slowly."""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    ends = time.monotonic() + PATIENCE_S
    while not (until.exists() and until.read_text()) and time.monotonic() < ends:
        time.sleep(0.01)
    return process


def is_running(pid: int) -> bool:
    """A process that has ended may stay in the table until its new parent asks for it."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_children_are_stopped_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep({PATIENCE_S})"
    process = started(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", pid)
    stop(process)
    ends = time.monotonic() + PATIENCE_S / 2
    while is_running(int(pid.read_text())) and time.monotonic() < ends:
        time.sleep(0.01)
    assert not is_running(int(pid.read_text())) and process.returncode is not None


def test_what_is_stopped_may_clean_up(tmp_path: Path) -> None:
    file = tmp_path / "said"
    code = f"""
import signal, sys, time
def clean(*_):
    open({str(file)!r}, "a").write("cleaned")
    sys.exit()
signal.signal(signal.SIGTERM, clean)
open({str(file)!r}, "w").write("begun, ")
time.sleep({PATIENCE_S})
"""
    stop(started(code, file))
    assert file.read_text() == "begun, cleaned"
