"""`python -m detr_profiling scaling`: training on many GPUs, on paper, from one GPU's step and the gradients' bytes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from detr_fast.config import Idle, UserError, model_config, require
from detr_fast.console import Console
from detr_fast.files import write_json
from detr_fast.model.detr import DETR
from detr_profiling.limits.exchange import Links, Scaled, Step, scaled
from detr_profiling.pages.results import LADDER_FILE, SCALING_FILE, TRACE_FILE, Results, complete, load_results
from detr_profiling.pages.scaling import FIGURES, KIND, TITLE, about, figures
from detr_profiling.report import MARKDOWN_FILE, write_report
from detr_profiling.tracing.tables import plain_table

USUAL_BACKWARD_SHARE = 0.6
"""Twice the forward pass, and a tenth for the rest of a step."""


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(Links):
    """Data-parallel training on many GPUs, on paper: from a measured step, the gradients' bytes and the links."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *(
            Idle(name, lambda o: max(o.gpus) == 1, "with one GPU, which exchanges nothing: give --gpus")
            for name in ("within_gb_s", "within_us", "reached", "bucket_mib", "backward_share")
        ),
        *(
            Idle(name, lambda o: max(o.gpus) <= o.gpus_a_machine, "within one machine: give more --gpus")
            for name in ("between_gb_s", "between_us")
        ),
    )
    out: str = "runs/profile"
    """Folder for scaling.json and the report; a ladder or trace of training that is there gives the step."""
    step_ms: float | None = None
    """A training step's time on one GPU; default: that of the ladder's fastest row, else the trace's."""
    model: str | None = None
    """With --step-ms: whose gradients; default: detr_r50. Otherwise the model that was measured."""
    batch_size: int | None = None
    """With --step-ms: images a step on each GPU; default: 16. Otherwise as measured."""
    backward_share: float | None = None
    """Of the step, the backward pass; default: the trace's, else 0.6."""
    gpus: tuple[int, ...] = (1, 8, 64, 256)
    """How many, each number a row or two."""
    bucket_mib: float = 25
    """Of gradients, as in DistributedDataParallel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.step_ms is None or self.step_ms > 0, f"--step-ms {self.step_ms}: must be positive.")
        require(self.batch_size is None or self.batch_size >= 1, f"--batch-size {self.batch_size}: at least 1.")
        share = self.backward_share
        require(share is None or 0 < share < 1, f"--backward-share {share}: between 0 and 1.")
        require(self.bucket_mib > 0, f"--bucket-mib {self.bucket_mib}: must be positive.")
        for gpus in self.gpus:
            require(
                gpus >= 1 and (gpus <= self.gpus_a_machine or gpus % self.gpus_a_machine == 0),
                f"--gpus {gpus}: at most a machine's {self.gpus_a_machine}, or several machines full.",
            )


@dataclass(frozen=True)
class Basis:
    """A step on one GPU, and where its numbers come from."""

    model: str
    batch_size: int
    step_ms: float
    step_from: str
    backward_share: float
    backward_from: str

    def step(self) -> Step:
        nbytes = gradient_bytes(self.model)
        return Step(self.step_ms, self.step_ms * self.backward_share, self.batch_size, nbytes)


def gradient_bytes(model: str) -> int:
    """Of its trained parameters in float32, as they are exchanged."""
    with torch.device("meta"):
        built = DETR(model_config(model))
    return sum(4 * parameter.numel() for parameter in built.parameters() if parameter.requires_grad)


def find_basis(options: ScalingOptions) -> Basis:
    """Raises UserError where no step was given or measured, or another than was asked for."""
    folder = Path(options.out)
    results = load_results(folder) if folder.is_dir() else Results(folder)
    share, share_from = options.backward_share, "given"
    if share is None:
        found = backward_share(results)
        share, share_from = (USUAL_BACKWARD_SHARE, "assumed") if found is None else (found, "trace.json")
    if options.step_ms is not None:
        return Basis(options.model or "detr_r50", options.batch_size or 16, options.step_ms, "given", share, share_from)
    measured = measured_step(results)
    if measured is None:
        raise UserError(f"No training step was measured in {folder}: give --step-ms, or run ladder or trace.")
    model, batch_size, step_ms, source = measured
    require(
        options.model in (None, model) and options.batch_size in (None, batch_size),
        f"Measured in {folder} was {model} with {batch_size} images a step: leave --model and --batch-size out, or "
        "give --step-ms too.",
    )
    return Basis(model, batch_size, step_ms, source, share, share_from)


def measured_step(results: Results) -> tuple[str, int, float, str] | None:
    """Model, images, milliseconds and source of the ladder's fastest row in training, else of the trace."""
    rows = [row for row in results.ladder if row.mode == "training" and row.median_ms is not None]
    if rows:
        fastest = min(rows, key=lambda row: row.median_ms or 0.0)
        place, source = dict(fastest.place), f"ladder.csv, {fastest.technique}"
        with complete(results.folder / LADDER_FILE, "ladder"):
            return place["model"], int(place["batch_size"]), fastest.median_ms or 0.0, source
    with complete(results.folder / TRACE_FILE, "trace"):
        if trace := training_trace(results):
            workload = trace["workload"]
            return workload["model"], workload["batch_size"], trace["step_ms"]["median"], "trace.json"
    return None


def backward_share(results: Results) -> float | None:
    """Of a traced training step, on the device where that is known; None without a trace of one."""
    with complete(results.folder / TRACE_FILE, "trace"):
        if trace := training_trace(results):
            on_gpu = trace["idle_share"] is not None
            times_ms = {row["name"]: row["device_ms" if on_gpu else "median_ms"] or 0.0 for row in trace["stages"]}
            return times_ms["backward"] / sum(times_ms.values())
    return None


def training_trace(results: Results) -> dict[str, Any] | None:
    return results.trace if results.trace and results.trace["workload"]["mode"] == "training" else None


def scaled_rows(options: ScalingOptions, step: Step) -> Iterator[Scaled]:
    """Of each number of GPUs: in buckets, and where there is an exchange at all, after the backward pass."""
    for gpus in options.gpus:
        yield scaled(step, gpus, options, options.bucket_mib * 2**20)
        if gpus > 1:
            yield scaled(step, gpus, options, None)


def main(options: ScalingOptions) -> None:
    basis, out, console = find_basis(options), Path(options.out), Console()
    step = basis.step()
    links = {each.name: getattr(options, each.name) for each in fields(Links)} | {"bucket_mib": options.bucket_mib}
    result: dict[str, Any] = {
        "basis": asdict(basis) | {"gradient_mib": step.gradient_bytes / 2**20},
        "links": links,
        "rows": [asdict(row) for row in scaled_rows(options, step)],
    }
    write_json(out / SCALING_FILE, result)
    write_report(out)
    table = plain_table("GPUs", FIGURES, TITLE)
    table.add_column(KIND)
    for row in result["rows"]:
        table.add_row(*figures(row))
    console.print(table)
    console.print(about(result))
    console.print(f"{out / SCALING_FILE}, and in {out / MARKDOWN_FILE}")
