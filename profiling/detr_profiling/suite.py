"""`python -m detr_profiling suite`: all measurements that fit the time, the most important first, in one folder.

Works in a checkout that is not installed too: `PYTHONPATH=.:kernels:profiling python -m detr_profiling suite`. Each
part is a process of its own and writes as it goes, so that whatever has finished is there when the suite is stopped.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rich.text import Text

from detr_fast.config import require
from detr_fast.console import Console
from detr_fast.files import open_growing, require_writable
from detr_profiling.command_line import arguments
from detr_profiling.report import write_report
from detr_profiling.workload import MOST_OBSERVED, WorkloadOptions

CHECKOUT = Path(__file__).parents[2]
KERNEL_TESTS = (
    *("packing", "batch_norm", "layer_norm", "matching_cost", "assignment", "set_loss", "pixels"),
    *("convolution_tail", "convolution", "convolution_library", "packed_attention", "xformers_attention"),
)
MOST_FILE_MIB = 10
SECONDS_TO_END = 5
"""From the request to end until a process is killed."""


@dataclass(frozen=True, kw_only=True)
class SuiteOptions(WorkloadOptions):
    """Kernel tests, parity, ladder, kernel timings, trace, and the report of them all."""

    compile: bool = True
    """Also measure the compiled forms; what is traced is not compiled, which would make its forward pass one stage."""
    out: str = "runs/profile"
    """Folder for at most 8 files."""
    minutes: float = 8
    """Time for everything; parts that do not fit are left out, and the report says so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.minutes > 0, f"--minutes must be positive, got {self.minutes}.")


@dataclass(frozen=True)
class Part:
    """A command that leaves one result, and the largest share of what is then left of the time that it may take."""

    name: str
    command: Callable[[SuiteOptions, float], list[str]]
    """From the options and the minutes it has."""
    share: float
    output: str | None = None
    """File for what it prints; None: it shows."""


def module(name: str) -> Callable[[SuiteOptions, float], list[str]]:
    def command(options: SuiteOptions, minutes: float) -> list[str]:
        return [sys.executable, "-m", "detr_profiling", name, "--out", options.out, *workload_arguments(options)]

    return command


def trace(options: SuiteOptions, minutes: float) -> list[str]:
    """Leave out what would make the forward pass one stage, and sizes, of which a trace has one."""
    return module("trace")(replace(options, compile=False, sizes="same", buckets=True), minutes)


def parity(options: SuiteOptions, minutes: float) -> list[str]:
    """Leave out what has no effect on what is compared."""
    images = min(options.batch_size, MOST_OBSERVED) if options.batch_size else None
    compared = replace(options, sizes="same", buckets=True, batch_size=images, dropout=None)
    return module("parity")(compared, minutes)


def ladder(options: SuiteOptions, minutes: float) -> list[str]:
    """Tell the ladder to stop in time."""
    return [*module("ladder")(replace(options, capture=False), minutes), "--minutes", f"{0.95 * minutes:.2f}"]


def pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(CHECKOUT)]


def kernel_tests(options: SuiteOptions, minutes: float) -> list[str]:
    files = [str(CHECKOUT / "tests" / f"test_{name}.py") for name in KERNEL_TESTS]
    at_once = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"] if find_spec("xdist") else []
    return [*pytest(), "-q", "--disable-warnings", *at_once, *files]


def kernel_timings(options: SuiteOptions, minutes: float) -> list[str]:
    output = ["--benchmark-only", "-k", "not compiled", f"--benchmark-json={options.out}/kernels.json", "-q"]
    return [*pytest(), str(CHECKOUT / "benchmarks" / "bench_kernels.py"), *output]


PARTS = (
    Part("kernel tests", kernel_tests, 0.25, "kernel_tests.txt"),
    Part("parity", parity, 0.3),
    Part("ladder", ladder, 0.75),
    Part("kernel timings", kernel_timings, 0.4),
    Part("trace", trace, 1.0),
)


def workload_arguments(options: SuiteOptions) -> list[str]:
    """Give the options of the workload as the parts' command lines take them; of --compile their defaults differ."""
    workload = {name: getattr(options, name) for name in WorkloadOptions().to_dict()}
    return list(arguments(workload, always=("compile",)))


def run_part(part: Part, options: SuiteOptions, seconds: float) -> str:
    """Run it for at most `seconds`; return how it ended."""
    command = part.command(options, seconds / 60)
    began = time.perf_counter()
    with open_growing(Path(options.out, part.output)) if part.output else nullcontext() as output:
        errors = subprocess.STDOUT if output else None
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds / 60:.1f} minutes"
        finally:
            stop(process)
    ended = "done" if code == 0 else f"exit code {code}"
    return f"{ended} in {time.perf_counter() - began:.0f} s"


def stop(process: subprocess.Popen) -> None:
    """End it and the processes that it started, which have its group.

    They are asked first: a C++ compiler that is killed leaves half a library in torch.compile's cache, which fails to
    load ever after.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(options: SuiteOptions) -> int:
    console, began = Console(), time.perf_counter()
    require_writable("--out", Path(options.out))
    failed = False
    for part in PARTS:
        left_s = options.minutes * 60 - (time.perf_counter() - began)
        ended = run_part(part, options, left_s * part.share) if left_s > 20 else "left out: no time"
        failed |= "exit code" in ended
        console.print(Text.assemble((part.name, "bold"), f": {ended}"))
        write_report(Path(options.out))
    for path in Path(options.out).iterdir():
        if path.stat().st_size > MOST_FILE_MIB << 20:
            console.print(f"{path} is larger than {MOST_FILE_MIB} MiB: fewer --steps, or a smaller model")
    console.print(f"{options.out}/report.html opens in any browser, without a network.")
    return int(failed)
