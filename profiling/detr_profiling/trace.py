"""`python -m detr_profiling trace`: where a step's time and memory go, in tables, figures and a trace to look at."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import tyro

from detr_fast.config import Idle, TrainConfig, require
from detr_fast.console import Console
from detr_fast.data.batch import Batch
from detr_fast.detector import place
from detr_fast.files import explained, require_writable
from detr_fast.runtime import choose_runtime
from detr_fast.training.build import make_batches, make_data, make_model, make_step
from detr_fast.training.distributed import World
from detr_fast.training.recipes import recipe_of
from detr_profiling.own_workload import build_workload
from detr_profiling.pages.terminal import show
from detr_profiling.pages.trace import trace_sections, workload_text
from detr_profiling.tracing.recording import RESULT_FILE, profile_workload, run_step
from detr_profiling.workload import Workload, WorkloadOptions

MOST_STEPS = 10
LARGE_TRACE_MIB = 100
SNAPSHOT_FILE = "memory_snapshot.pickle"
SNAPSHOT_ENTRIES = 200_000


@dataclass(frozen=True, kw_only=True)
class TraceOptions(WorkloadOptions):
    """One step in a profiler: stages, kernels, device synchronisations, memory, roofline."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *WorkloadOptions.idle,
        Idle("objects", lambda o: o.data is not None, "beside --data, whose images have their own: give one of them"),
    )
    out: str = "runs/profile"
    """Folder for trace.pt.json.gz, the trace itself, and trace.json, its figures."""
    steps: int = 3
    """Steps to record, 2 to 10: from the second on it shows whether memory grows."""
    warmup: int = 2
    """Steps before, with the profiler and without it."""
    sizes: tyro.conf.Suppress[Literal["same"]] = "same"
    """One step again and again; images of several sizes are a data set's."""
    data: str | None = None
    """Train on this data, a folder in COCO layout or shapes:SIDE, so that waiting for data shows; default: one batch
    again and again."""
    memory_snapshot: bool = False
    """Also write memory_snapshot.pickle, every allocation of one step with its place in the code; needs a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            2 <= self.steps <= MOST_STEPS,
            f"--steps {self.steps}: 2 to {MOST_STEPS}. Growth of memory needs two, and a step has up to some 100,000 "
            "events, which viewers hold all at once.",
        )
        require(self.warmup >= 1, f"--warmup {self.warmup}: at least 1, the first step is not like others.")
        require(
            self.data is None or self.mode == "training",
            "--data feeds training. Leave out --mode inference, or --data.",
        )

    @property
    def mixes_sizes(self) -> bool:
        return self.data is not None


class Feed:
    """Batches of a loader, one at a time: fetched, taken once, and not kept."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._batch: Batch | None = None

    def fetch(self) -> None:
        self._batch = next(self._batches)

    def take(self) -> Batch:
        assert self._batch is not None
        batch, self._batch = self._batch, None
        return batch


def training_options(options: WorkloadOptions, data: str) -> TrainConfig:
    """Take the recipe of the model for `data`, from random weights; a --size bounds the shorter and the longer side."""
    recipe = recipe_of(options.model, data)
    shared = {each.name for each in fields(TrainConfig)} & {each.name for each in fields(WorkloadOptions)}
    changes: dict[str, Any] = {name: getattr(options.resolved(), name) for name in shared}
    if options.size != "auto":
        shorter, longer = sorted(options.height_width)
        changes |= {"train_sizes": (shorter,), "crop_sizes": (), "image_size": shorter, "max_size": longer}
    return replace(recipe, data=data, backbone_weights="none", **changes)


def build_fed_workload(options: TraceOptions, data: str) -> Workload:
    """Build a training step on the batches of `data`. Raises UserError for data that cannot be read."""
    config, resolved = training_options(options, data), options.resolved()
    torch.set_num_threads(resolved.threads or torch.get_num_threads())
    runtime, world = choose_runtime(config), World()
    train_set, _, architecture = make_data(config)
    model = place(make_model(architecture, config, train_set, None, Console()), runtime)
    step = make_step(model.train(), config, runtime, world, None)
    feed = Feed(make_batches(config, train_set, runtime, world, (0, 0)))
    # with the data's name, and no size where nobody asked for one: images are as the recipe makes them
    asked = replace(options, **{name: getattr(resolved, name) for name in ("device", "batch_size", "threads")})

    def run() -> Any:
        return step([feed.take()])

    return Workload("detr_fast", asked, model, run, reasons=runtime.reasons, fetch=feed.fetch)


def main(options: TraceOptions) -> int:
    require(
        not options.memory_snapshot or options.resolved().device == "cuda",
        "--memory-snapshot is of CUDA's allocator. Leave it out on a CPU: trace.json has the memory curve.",
    )
    out, console = Path(options.out), Console()
    require_writable("--out", out)  # before minutes are spent on figures that cannot be kept
    workload = build_workload(options) if options.data is None else build_fed_workload(options, options.data)
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
