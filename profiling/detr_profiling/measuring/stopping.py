"""Stops a process with all that it started."""

import os
import signal
import subprocess
from contextlib import suppress

SECONDS_TO_END = 5
"""How long a process that was asked to end has until it is killed."""


def stop(process: subprocess.Popen) -> None:
    """End a process that leads its own group, and the processes in that group.

    They are asked first: a C++ compiler that is killed leaves half a library in torch.compile's cache, which fails to
    load ever after.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
