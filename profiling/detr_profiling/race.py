"""`python -m detr_profiling race`: ours beside what people would otherwise take, in turns.

The plain reference and Hugging Face's DETR, eager and compiled, on the same weights and the same photographs, which
all resize on the device within the step (`detr_profiling.baselines.plain_loop` says why). Each measurement is a process
of its own, and all take turns, round after round, as the ladder's rows do.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from rich.table import Table

from detr_fast.config import Idle, require
from detr_fast.console import Console
from detr_fast.runtime import choose_device, choose_precision, missing_for_compile
from detr_fast.training.run_folder import writing
from detr_profiling.ladder import REFERENCE, LadderOptions, Rung, figures, measure_rungs, rows_of, rung_verdict
from detr_profiling.ladder import write_rows as write_rungs
from detr_profiling.limits.counting import count_work
from detr_profiling.limits.peaks import measure_peaks
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.measuring.techniques import start
from detr_profiling.pages.formats import number
from detr_profiling.pages.results import RACE_FILE
from detr_profiling.report import write_report
from detr_profiling.tracing.tables import plain_table
from detr_profiling.workload import WorkloadOptions, build_workload

EAGER_BASELINES = (REFERENCE, "hf-eager", "hf-sdpa")
"""In float32."""


@dataclass(frozen=True, kw_only=True)
class RaceOptions(LadderOptions):
    """Measure ours in the form that these options ask for, and its baselines beside it."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *WorkloadOptions.idle,
        Idle("same_settings", lambda o: o.resolved().device == "cuda", "on a GPU: give --device cpu"),
        Idle(
            "compiled_baseline",
            lambda o: o.compiled_baseline and missing_for_compile() is not None,
            "without a compiler, which doctor tells how to get: give --no-compiled-baseline",
        ),
    )
    compile: bool = False
    """Ours compiled with torch.compile."""
    leave_one_out: bool = False
    compiled_baseline: bool = True
    """Also Hugging Face's DETR compiled, which takes minutes on a CPU."""
    same_settings: bool = True
    """On a CPU let the baselines keep freed memory too, as ours does by itself; without, they run as they come."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.leave_one_out, "--leave-one-out belongs to the ladder.")


def entrants(options: RaceOptions) -> list[Rung]:
    """The eager baselines, the compiled one, the reference in our precision, and ours."""
    ours = options.resolved()
    plain = replace(start(ours), keeps_memory=options.same_settings)
    rungs = [Rung(name, replace(plain, implementation=name)) for name in EAGER_BASELINES]
    if options.compiled_baseline and missing_for_compile() is None:
        rungs.append(Rung("hf-compiled", replace(plain, implementation="hf-compiled")))
    dtype, _ = choose_precision(ours.precision, choose_device(ours.device)[0])
    if dtype == torch.bfloat16:
        rungs.append(
            Rung("reference bf16", replace(plain, options=replace(plain.options, precision="bf16"), tf32=True))
        )
    return [*rungs, Rung("detr_fast", Configuration(ours))]


def fastest_eager_ms(rungs: list[Rung]) -> float | None:
    """None where no eager baseline was measured."""
    times = [rung.measured.timing.median_ms for rung in rungs if rung.technique in EAGER_BASELINES and rung.measured]
    return min(times, default=None)


def peak_share(options: WorkloadOptions, median_ms: float) -> float:
    """The products that a step needs, over those that the device could make in that time: measured here and now."""
    workload = build_workload(replace(options.resolved(), compile=False))
    flop = sum(work.flop for work in count_work(workload.run).values()) / len(workload.shapes)
    dtype, _ = choose_precision(options.precision, workload.device)
    return flop / (median_ms / 1e3) / (measure_peaks(workload.device, dtype).product_tflop_s * 1e12)


def table(rungs: list[Rung]) -> Table:
    titles = ["ms", "spread", "over reference", "padding", "peak MiB", "error"]
    shown = plain_table("", titles, "In turns, each in a process of its own")
    shown.add_column("")
    for rung in rungs:
        cells = figures(rung, rungs[0].measured)
        shown.add_row(rung.technique, *(cells[: len(titles)] if cells else [""] * len(titles)), rung_verdict(rung))
    return shown


def main(options: RaceOptions) -> int:
    console, out, rungs = Console(), Path(options.out), entrants(options)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for _ in measure_rungs(rungs, options, console):
        write_rungs(rows_of(rungs, options), out / RACE_FILE)
    write_report(out)
    console.print(table(rungs))
    eager, ours = fastest_eager_ms(rungs), rungs[-1].measured
    if eager and ours:
        share = peak_share(options, ours.timing.median_ms)
        console.print(f"{number(eager / ours.timing.median_ms)} times the fastest eager form of the others; ")
        console.print(f"{share:.0%} of this device's measured matrix peak. {out / RACE_FILE}")
    return 0 if all(rung.measured and rung.measured.close is not False for rung in rungs) else 1
