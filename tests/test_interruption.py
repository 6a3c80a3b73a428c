"""A signal asks once, and the second one is obeyed at once (docs/faults.md, row 7)."""

import signal
import subprocess
import sys

import pytest

from detr_fast.training.interruption import deferred_interruption

WAIT = """
import time
from detr_fast.training.interruption import deferred_interruption
with deferred_interruption() as interruption:
    print("ready", flush=True)
    while interruption.signal_number is None:
        time.sleep(0.01)
    print("noted", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(number)
    assert process.wait(timeout=300) == -number


def test_handlers_are_given_back_and_the_exit_code_is_a_shells() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with deferred_interruption() as interruption:
        assert interruption.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
    assert interruption.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
