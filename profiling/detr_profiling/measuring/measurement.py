"""One configuration measured in a process of its own, so that nothing of another one is left in memory or caches."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from detr_fast.config import UserError
from detr_fast.files import atomic_write
from detr_fast.host_memory import choose_host_allocator, use_host_allocator
from detr_fast.options import Precision
from detr_fast.runtime import choose_device
from detr_profiling.baselines.build import build_baseline
from detr_profiling.batches import batch_shapes
from detr_profiling.comparison.judgement import Row, judge, targets_of, worst
from detr_profiling.measuring.memory import peak_memory
from detr_profiling.measuring.nvml import Sampler
from detr_profiling.measuring.timing import STEADY_AFTER, Timing, calls_a_run, measure
from detr_profiling.mixed_sizes import padding
from detr_profiling.own_workload import build_workload
from detr_profiling.workload import Workload, WorkloadOptions

NO_TIME = "no time left"
"""Begins the reason of what was not measured for want of time."""
FLOAT64 = "fp64.pt"
"""The reference's observation in float64; beside it lie those in eager precisions: fp32.pt, tf32.pt, bf16.pt."""


@dataclass(frozen=True)
class Configuration:
    """Names what to build: ours or a baseline, with options, and backends of single operations."""

    options: WorkloadOptions
    implementation: str = "detr_fast"
    backends: Mapping[str, Any] = field(default_factory=dict)
    tf32: bool = True
    """On a GPU."""

    def build(self) -> Workload:
        """Build its workload in this process, which then has the options' host allocator for good.

        Raises UserError where something asked for by name is not there.
        """
        device, _ = choose_device(self.options.runtime.device)
        use_host_allocator(choose_host_allocator(self.options.runtime.host_allocator, device)[0])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if self.implementation == "detr_fast":
            return build_workload(self.options, self.backends)
        return build_baseline(self.implementation, self.options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"options": self.options.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**(values | {"options": WorkloadOptions.from_dict(values["options"])}))


@dataclass(frozen=True)
class Measurement:
    """Holds times, memory, energy and error of one configuration, in one process or several."""

    timing: Timing
    """Time of a step; where a run has several steps, of differing sizes, their mean."""
    peak_mib: float
    cpu_seconds_per_image: float
    energy_j_per_image: float | None
    """None where no GPU counts it."""
    first_run_s: float
    """Seconds of the first run, which compiles and chooses algorithms."""
    padding: float | None = None
    """Pixels computed for each that is an image's."""
    error: float | None = None
    """Error of the quantity that is nearest to what is allowed, or past it; None where nothing is compared."""
    allowed: float | None = None
    quantity: str | None = None
    close: bool | None = None
    steps_a_run: int = 1
    """Issued back to back between two waits for the device; of a round's first process."""

    def joined(self, other: Self) -> "Measurement":
        """Join a second process's runs: times are pooled; the larger peak and the first process's error stay."""
        return replace(
            self,
            timing=self.timing + other.timing,
            peak_mib=max(self.peak_mib, other.peak_mib),
            first_run_s=max(self.first_run_s, other.first_run_s),
        )


def measure_workload(configuration: Configuration, runs: int, references: Path | None) -> Measurement:
    """Measure in this process: first the times of `runs` runs, once nothing is compiled or captured any more;
    then the error against the observations in the folder `references`, unless that is None."""
    workload = configuration.build()
    first_ms = measure(workload.run, workload.synchronize, rounds=1, warmup=0).median_ms
    measurement = measure_runs(workload, runs, first_ms / 1e3)
    if references is None or workload.observe is None:
        return measurement
    workload.model.load_state_dict(configuration.build().model.state_dict())  # the runs have trained it
    row = compare(workload, configuration, references)
    return replace(measurement, error=row.error, allowed=row.allowed, quantity=row.quantity, close=row.close)


def compare(workload: Workload, configuration: Configuration, references: Path) -> Row:
    """Compare what a workload computes with the reference, whose observations are in the folder `references`.

    Returns the row that is nearest to its limit, or past it. Raises ValueError for a workload that is not comparable.
    """
    if workload.observe is None:
        raise ValueError(f"{workload.name} is not comparable")
    exact, eager = torch.load(references / FLOAT64), torch.load(references / eager_file(configuration))
    return worst(judge(workload.observe(), exact, eager))


def measure_runs(workload: Workload, runs: int, first_run_s: float) -> Measurement:
    """Measure `runs` runs of a workload that has run once, which took `first_run_s`; on a GPU several calls each."""
    kind, shapes = workload.device.type, batch_shapes(workload.options)
    warm = measure(workload.run, workload.synchronize, rounds=1, warmup=STEADY_AFTER[kind] - 2)
    calls = calls_a_run(kind, warm.median_ms)
    with Sampler(workload.device) as sampler, peak_memory(workload.device) as peak:
        cpu_began = time.process_time()
        timing = measure(workload.run, workload.synchronize, runs, warmup=0, calls=calls)
        cpu_s = time.process_time() - cpu_began
    images = sum(len(shape.sizes) for shape in shapes) * runs * calls
    summary = sampler.summary()
    energy_j = summary.energy_joules / images if summary and summary.energy_joules is not None else None
    return Measurement(
        timing / len(shapes),
        peak.mib,
        cpu_s / images,
        energy_j,
        first_run_s,
        padding(shapes),
        steps_a_run=calls * len(shapes),
    )


def write_references(options: WorkloadOptions, folder: Path) -> None:
    """Write the plain reference's observations in float64, and eager in each precision."""
    references: tuple[tuple[str, Precision, torch.dtype], ...] = (
        (FLOAT64, "fp32", torch.float64),
        ("fp32.pt", "fp32", torch.float32),
        ("tf32.pt", "fp32", torch.float32),
        ("bf16.pt", "bf16", torch.float32),
    )
    for name, precision, dtype in references:
        if name == "tf32.pt" and options.runtime.device != "cuda":
            continue
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32.pt"
        plain = options.observed().but(precision=precision, compile=False, kernels="auto", attention="auto")
        observe = build_baseline("reference", plain, dtype).observe
        assert observe is not None
        with atomic_write(folder / name) as file:
            torch.save(observe() | targets_of(options), file)


def eager_file(configuration: Configuration) -> str:
    """Name the file of the eager reference that multiplies as `configuration` does."""
    runtime = configuration.options.runtime
    if runtime.precision != "fp32":
        return "bf16.pt"
    return "tf32.pt" if configuration.tf32 and runtime.device == "cuda" else "fp32.pt"


def measure_in_process(
    configuration: Configuration, runs: int, references: Path | None = None, limit_s: float | None = None
) -> Measurement:
    """Call `measure_workload` in a fresh process. Raises UserError as `run_fresh` does."""
    folder = str(references) if references else None
    order = {"configuration": configuration.to_dict(), "runs": runs, "references": folder}
    answer = json.loads(run_fresh(order, limit_s))
    return Measurement(**(answer | {"timing": Timing(tuple(answer["timing"]["runs_ms"]))}))


def write_references_in_process(options: WorkloadOptions, folder: Path) -> None:
    """Call `write_references` in a fresh process."""
    run_fresh({"configuration": Configuration(options).to_dict(), "write_references": str(folder)})


def run_fresh(order: dict[str, Any], limit_s: float | None = None) -> str:
    """Run this file in a fresh process with `order` on its standard input; return the last line that it prints.

    Raises UserError with the process's last words where it fails, and where it takes more than `limit_s`.
    """
    command = [sys.executable, "-m", "detr_profiling.measuring.measurement"]
    try:
        done = subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{NO_TIME}: not done in {limit_s:.0f} s") from error
    if done.returncode != 0:
        reason = last_words(done.stderr) or f"exit code {done.returncode}, killed for memory?"
        raise UserError(f"{order['configuration']['implementation']} could not be measured: {reason}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def last_words(errors: str) -> str:
    """Find the line that names the exception in what a process wrote before it failed, after which torch still gives
    advice; without one the last line."""
    lines = errors.strip().splitlines()
    named = [line for line in lines if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt): ", line)]
    return (named or lines or [""])[-1]


def obey(order: dict[str, Any]) -> None:
    configuration = Configuration.from_dict(order["configuration"])
    if folder := order.get("write_references"):
        write_references(configuration.options, Path(folder))
        return
    references = Path(order["references"]) if order["references"] else None
    print(json.dumps(asdict(measure_workload(configuration, order["runs"], references))))


if __name__ == "__main__":
    obey(json.load(sys.stdin))
