"""`python -m detr_profiling trace`: where a step's time and memory go, in tables, figures and a trace to look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from detr_fast.config import require
from detr_fast.console import Console
from detr_fast.files import explained, require_writable
from detr_fast.option_groups import Idle, Options
from detr_fast.options import Output
from detr_profiling.fed_workload import build_fed_workload
from detr_profiling.own_workload import build_workload
from detr_profiling.pages.terminal import show
from detr_profiling.pages.trace import trace_sections, workload_text
from detr_profiling.tracing.recording import RESULT_FILE, profile_workload, run_step
from detr_profiling.workload import OneSizeOptions, Workload, WorkloadOptions

MOST_STEPS = 10
LARGE_TRACE_MIB = 100
SNAPSHOT_FILE = "memory_snapshot.pickle"
SNAPSHOT_ENTRIES = 200_000


@dataclass(frozen=True, kw_only=True)
class TraceOptions(Options):
    """One step in a profiler: its ranges, kernels, device synchronisations, memory, roofline."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("buckets", lambda o: o.data is None, "where all images have one size: give --data"),
        Idle("objects", lambda o: o.data is not None, "beside --data, whose images have their own: give one of them"),
    )
    output: Output = "runs/profile"
    """Folder for trace.pt.json.gz, the trace itself, and trace.json, its figures."""
    steps: int = 3
    """Steps to record, 2 to 10: from the second on it shows whether memory grows."""
    warmup: int = 2
    """Steps before, with the profiler and without it."""
    data: str | None = None
    """Train on this data, a folder in COCO layout or shapes:SIDE, so that waiting for data shows; default: one batch
    again and again."""
    memory_snapshot: bool = False
    """Also write memory_snapshot.pickle, every allocation of one step with its place in the code; needs a GPU."""

    workload: WorkloadOptions = WorkloadOptions(mix=OneSizeOptions())

    def __post_init__(self) -> None:
        require(
            2 <= self.steps <= MOST_STEPS,
            f"--steps {self.steps}: 2 to {MOST_STEPS}. Growth of memory needs two, and a step has up to some 100,000 "
            "events, which viewers hold all at once.",
        )
        require(self.warmup >= 1, f"--warmup {self.warmup}: at least 1, the first step is not like others.")
        require(
            self.data is None or self.workload.mode == "training",
            "--data feeds training. Leave out --mode inference, or --data.",
        )


def main(options: TraceOptions) -> int:
    require(
        not options.memory_snapshot or options.workload.resolved().runtime.device == "cuda",
        "--memory-snapshot is of CUDA's allocator. Leave it out on a CPU: trace.json has the memory curve.",
    )
    asked, out, console = options.workload, Path(options.output), Console()
    require_writable("--output", out)  # before minutes are spent on figures that cannot be kept
    workload = build_workload(asked) if options.data is None else build_fed_workload(asked, options.data)
    with explained(out):
        result = profile_workload(workload, out, options.steps, options.warmup)
        if options.memory_snapshot:
            write_memory_snapshot(workload, out / SNAPSHOT_FILE)
    console.print(workload_text(result))
    show(trace_sections(result), console)
    for line in how_to_look(result, out, options.memory_snapshot):
        console.print(line)
    return 1 if result["problem"] else 0


def write_memory_snapshot(workload: Workload, path: Path) -> None:
    """Write every allocation of one step, as https://pytorch.org/memory_viz reads it."""
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
    run_step(workload)
    workload.synchronize()
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)


def how_to_look(result: dict[str, Any], out: Path, snapshot: bool) -> Iterator[str]:
    trace = out / result["trace_file"]
    yield f"{trace} ({result['trace_mib']:.1f} MiB): drag it into https://ui.perfetto.dev or chrome://tracing."
    if result["trace_unpacked_mib"] > LARGE_TRACE_MIB:
        yield (
            f"warning: unpacked it has {result['trace_unpacked_mib']:.0f} MiB, and viewers may be slow. "
            "--steps 2 makes it smaller."
        )
    yield f"{out / RESULT_FILE}: all figures above, the memory curve and the whole tables."
    if snapshot:
        yield f"{out / SNAPSHOT_FILE}: drag it into https://pytorch.org/memory_viz."
    if problem := result.get("problem"):
        yield f"NOT complete: {problem}"
