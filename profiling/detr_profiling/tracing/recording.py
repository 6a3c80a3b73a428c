"""A few steps in torch's profiler, and the same steps without it: all figures of a trace in one block."""

import gc
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from detr_fast.files import write_text
from detr_fast.profiler_ranges import profiler_range
from detr_fast.runtime import choose_precision
from detr_profiling.limits.peaks import measure_peaks
from detr_profiling.limits.roofline import count_work, roofline
from detr_profiling.measuring.machine import describe_machine
from detr_profiling.measuring.memory import resident_peak_mib, restart_resident_peak
from detr_profiling.measuring.nvml import Sampler
from detr_profiling.measuring.timing import STEADY_AFTER, Timing, calls_a_run, measure
from detr_profiling.tracing.allocations import living_tensors_mib, memory_use
from detr_profiling.tracing.breakdown import (
    RangeTime,
    idle_fraction,
    kernel_usage,
    launches_per_step,
    operator_usage,
    range_times,
)
from detr_profiling.tracing.synchronizations import synchronizations
from detr_profiling.tracing.timeline import CLOSING, Timeline, read_timeline
from detr_profiling.workload import Workload

TRACE_FILE = "trace.pt.json.gz"
RESULT_FILE = "trace.json"
LEAST_TIMED_STEPS = 5
NO_DEVICE_EVENTS = (
    "The trace has nothing of what ran on the GPU: the driver has not let CUPTI record it. "
    "Times, fractions and waits are the host's alone. "
    "Run as root (in a container with --cap-add=SYS_ADMIN), or have the driver's module loaded with "
    "NVreg_RestrictProfilingToAdminUsers=0."
)


class Profiled(NamedTuple):
    """Holds a few steps as torch's profiler has them."""

    timeline: Timeline
    """The Chrome trace, read back."""
    averages: EventList
    """`key_averages()`"""
    before_mib: float
    """MiB that tensors on the CPU held when the profiler began."""


def record(workload: Workload, path: Path, steps: int = 3, warmup: int = 2) -> Profiled:
    """Profile `steps` steps after `warmup` others, at least one each, and write the Chrome trace to `path`.

    That is a .json or a .json.gz file. Gradients are dropped before the first recorded step: so all steps begin alike.
    """
    on_gpu = workload.device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it calls it an error that there is no GPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    plan = schedule(wait=0, warmup=warmup, active=steps, repeat=1)
    before_mib = 0.0
    with profile(activities=activities, schedule=plan, profile_memory=True, acc_events=True) as profiler:
        for index in range(warmup + steps):
            run_step(workload)
            if on_gpu:
                with record_function(CLOSING):
                    workload.synchronize()
            if index == warmup - 1:
                workload.model.zero_grad(set_to_none=True)
                gc.collect()
                before_mib = living_tensors_mib()
            profiler.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return Profiled(read_timeline(path), profiler.key_averages(), before_mib)


def run_step(workload: Workload) -> None:
    with profiler_range("data wait"):
        workload.fetch()
    workload.run()


@dataclass(frozen=True)
class Plain:
    """Holds what steps need without the profiler."""

    timing: Timing
    cpu_seconds_per_step: float
    peak_rss_mib: float
    """NaN where /proc does not say."""
    gpu: dict[str, Any] | None


def missing_events(device: torch.device, timeline: Timeline) -> str | None:
    """Say what a trace of work on `device` lacks, and how to get it; None where it is complete."""
    return NO_DEVICE_EVENTS if device.type == "cuda" and not timeline.device else None


def measure_plain(workload: Workload, runs: int, warmup: int) -> Plain:
    """Measure `runs` runs, on a GPU of several steps each, after at least `warmup` others, in which things compile."""
    kind, step = workload.device.type, partial(run_step, workload)
    warmup = max(warmup, STEADY_AFTER[kind] - 1) if kind == "cuda" else warmup - 1
    calls = calls_a_run(kind, measure(step, workload.synchronize, rounds=1, warmup=warmup).median_ms)
    restart_resident_peak()
    with Sampler(workload.device) as sampler:
        cpu_began = time.process_time()
        timing = measure(step, workload.synchronize, rounds=runs, warmup=0, calls=calls)
        cpu_s = time.process_time() - cpu_began
    summary = sampler.summary()
    return Plain(timing, cpu_s / (runs * calls), resident_peak_mib(), summary.to_dict() if summary else None)


def profile_workload(
    workload: Workload, out: Path, steps: int = 3, warmup: int = 2, with_roofline: bool = True
) -> dict[str, Any]:
    """Write OUT/trace.pt.json.gz and OUT/trace.json, and return what the latter holds.

    `step_ms` and `process` are of steps without the profiler, which costs time in every operator; on a GPU these are
    issued back to back. What is split by range or operator is of the `steps` profiled ones, each of which waits for the
    device at its end. Lists hold numbers of one step; None: does not apply, or unknown. `problem`: what the trace
    lacks, or None.
    """
    plain = measure_plain(workload, max(steps, LEAST_TIMED_STEPS), warmup)
    trace = out / TRACE_FILE
    timeline, averages, before_mib = record(workload, trace, steps, warmup)
    ranges = range_times(timeline)
    memory = memory_use(timeline, before_mib)
    problem = missing_events(workload.device, timeline)
    with_roofline &= problem is None  # a range's fraction of the host's time is not its fraction of the device's
    result = {
        "machine": describe_machine(workload.device).to_dict(),
        "workload": workload.to_dict(),
        "steps": steps,
        "step_ms": plain.timing.to_dict(),
        "profiled_step_ms": Timing(tuple(step.duration_ns / 1e6 for step in timeline.steps)).to_dict(),
        "ranges": [row.to_dict() for row in ranges],
        "idle_fraction": idle_fraction(timeline),
        **count_figures(timeline),
        "operators": list(map(asdict, operator_usage(averages, timeline))),
        "kernels": list(map(asdict, kernel_usage(averages, steps))),
        "memory": asdict(memory) if memory else None,
        "gpu": plain.gpu,
        "process": {"cpu_seconds_per_step": plain.cpu_seconds_per_step, "peak_rss_mib": plain.peak_rss_mib},
        "backends": workload.reasons,
        "roofline": roofline_of(workload, ranges, plain.timing) if with_roofline else None,
        "problem": problem,
        "trace_file": TRACE_FILE,
        "trace_mib": trace.stat().st_size / 2**20,
        "trace_unpacked_mib": unpacked_bytes(trace) / 2**20,
    }
    result = without_nan(result)
    write_text(out / RESULT_FILE, json.dumps(result, indent=1, allow_nan=False))
    return result


def count_figures(timeline: Timeline) -> dict[str, Any]:
    waits = synchronizations(timeline)
    launches, launch_kind = launches_per_step(timeline)
    return {
        "synchronizations_per_step": sum(row.per_step for row in waits),
        "synchronizations": list(map(asdict, waits)),
        "launches_per_step": launches,
        "launch_kind": launch_kind,
    }


def roofline_of(workload: Workload, ranges: list[RangeTime], step: Timing) -> dict[str, Any]:
    """Compute the roofline from each range's time on the device, or from its fraction of the host's, scaled to the
    unprofiled step."""
    dtype, _ = choose_precision(workload.options.runtime.precision, workload.device)
    if workload.name != "detr_fast" and workload.options.runtime.precision != "bf16":
        dtype = torch.float32  # a baseline's own
    range_ms = {row.name: row.fraction * step.median_ms if row.device_ms is None else row.device_ms for row in ranges}
    work = count_work(partial(run_step, workload))
    return asdict(roofline(work, range_ms, step.median_ms, measure_peaks(workload.device, dtype)))


def unpacked_bytes(path: Path) -> int:
    """Read the unpacked size that a gzip file of less than 4 GiB has at its end."""
    return int.from_bytes(path.read_bytes()[-4:], "little")


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
