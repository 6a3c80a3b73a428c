"""A configuration held ready in a process of its own and timed when asked: a crash or a hang costs it alone.

Parent and child speak in lines of JSON, over the child's standard input and output.
"""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch

from detr_profiling.measuring.measurement import Configuration, compare, last_words
from detr_profiling.measuring.memory import peak_memory
from detr_profiling.measuring.stopping import SECONDS_TO_END, stop
from detr_profiling.measuring.timing import STEADY_AFTER, Timing, measure
from detr_profiling.workload import Workload, WorkloadOptions

COMMAND = (sys.executable, "-m", "detr_profiling.measuring.candidate")
MOST_OBSERVED_PX, MOST_OBSERVED = 2**16, 2
"""Pixels of an image, and images, of what is compared with the reference: in float64, more would take minutes."""


class CandidateError(Exception):
    """Raised where a candidate cannot be timed, with the words of what failed."""


def compared(options: WorkloadOptions) -> WorkloadOptions:
    """Return the workload of `options` at the size at which it is compared with the reference."""
    options = options.resolved()
    height, width = options.height_width
    scale = min(1.0, (MOST_OBSERVED_PX / (height * width)) ** 0.5)
    size = f"{max(1, round(height * scale))}x{max(1, round(width * scale))}"
    return options.but(size=size, size_mix="same", batch_size=min(options.batch_size or 1, MOST_OBSERVED))


class Candidate:
    """Drives a candidate from the parent's side; the process starts when it is first needed."""

    def __init__(self, configuration: Configuration, command: Sequence[str] = COMMAND) -> None:
        self.configuration = configuration
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the candidate
        self.peak_mib = 0.0

    def time(self, runs: int, limit_s: float, calls: int = 1) -> Timing:
        """Time a step in `runs` runs of `calls` steps each, after a warm-up. Raises CandidateError."""
        answer = self._ask({"time": [runs, calls], "configuration": self.configuration.to_dict()}, limit_s)
        self.peak_mib = max(self.peak_mib, answer["peak_mib"])
        return Timing(tuple(answer["runs_ms"]))

    def judge(self, references: Path, limit_s: float) -> dict[str, Any]:
        """Compare with the reference, whose observations are in the folder `references`.

        Returns `quantity`, `error`, `allowed` and `close` of the quantity that is nearest to what is allowed, or
        past it. Raises CandidateError.
        """
        return self._ask({"judge": str(references), "configuration": self.configuration.to_dict()}, limit_s)

    def start(self) -> None:
        """Begin, if that has not been done yet; nothing is built before `time` or `judge` ask for it."""
        if self.process is None:
            self.errors.seek(0)  # the process writes from there on
            self.errors.truncate()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                start_new_session=True,
                bufsize=0,
            )

    def park(self) -> None:
        """Give the device's memory back; the next `time` builds it again."""
        if self.process is not None:
            self._ask({"park": True}, 60)

    def close(self) -> None:
        """End the process, with those that it started."""
        if self.process is not None:
            process, self.process = self.process, None
            with process:  # closes the pipes
                stop(process)

    def _ask(self, order: dict[str, Any], limit_s: float) -> dict[str, Any]:
        self.start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write((json.dumps(order) + "\n").encode())
        except BrokenPipeError as error:
            raise CandidateError(self._cause_of_death()) from error
        return json.loads(self._line(limit_s))

    def _line(self, limit_s: float) -> bytes:
        """Read what the process answers. Raises CandidateError where it ends or takes longer than `limit_s`."""
        assert self.process is not None and self.process.stdout is not None
        ends, line = time.perf_counter() + limit_s, b""
        while not line.endswith(b"\n"):
            left_s = ends - time.perf_counter()
            if left_s <= 0 or not select.select([self.process.stdout], [], [], left_s)[0]:
                self.close()
                raise CandidateError(f"hung: no answer within {limit_s:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise CandidateError(self._cause_of_death())
            line += part
        return line

    def _cause_of_death(self) -> str:
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_END)
        process = self.process
        self.close()
        code = process.returncode
        self.errors.seek(0)
        said = last_words(self.errors.read().decode(errors="replace"))
        if code < 0:
            return f"crashed: {signal.Signals(-code).name}"
        return said or f"exit code {code}"


class Server:
    """Answers on the child's side: builds what it is asked about, once."""

    def __init__(self) -> None:
        self.workload: Workload | None = None

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if order.get("park"):
            self.workload = None
            gc.collect()
            torch.cuda.empty_cache()
            return {}
        configuration = Configuration.from_dict(order["configuration"])
        if folder := order.get("judge"):
            return self.judge(configuration, Path(folder))
        return self.time(configuration, *order["time"])

    def time(self, configuration: Configuration, runs: int, calls: int) -> dict[str, Any]:
        if self.workload is None:
            self.workload = configuration.build()
            measure(self.workload.run, self.workload.synchronize, 1, STEADY_AFTER[self.workload.device.type])
        with peak_memory(self.workload.device) as peak:
            timing = measure(self.workload.run, self.workload.synchronize, runs, warmup=1, calls=calls)
        reserved = torch.cuda.max_memory_reserved() if self.workload.device.type == "cuda" else 0
        return {"runs_ms": timing.runs_ms, "peak_mib": max(peak.mib, reserved / 2**20)}

    def judge(self, configuration: Configuration, references: Path) -> dict[str, Any]:
        workload = replace(configuration, options=compared(configuration.options)).build()
        row = asdict(compare(workload, configuration, references))
        return {name: row[name] for name in ("quantity", "error", "allowed", "close")}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    server = Server()
    for line in sys.stdin:
        print(json.dumps(server.obey(json.loads(line))), file=answers)  # an error ends it, and is its last word


if __name__ == "__main__":
    main()
