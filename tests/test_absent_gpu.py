"""Runs `gpu_cases.py` in a process of its own: torch is made to believe in a GPU there, or has a real one."""

import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("gpu_cases.py")


def test_in_a_process_of_its_own() -> None:
    options = ["-q", "-p", "no:cacheprovider", "-o", "python_functions=check_*"]
    command = [sys.executable, "-m", "pytest", *options, str(CASES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout and "skipped" not in result.stdout
