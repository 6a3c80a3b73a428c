"""`python -m detr_profiling race`: ours compared with baselines, in turns.

The baselines are the plain reference and Hugging Face's DETR, eager and compiled, on the same weights and the same
photographs, which all resize on the device within the step (`detr_profiling.baselines.plain_loop` says why). They are
measured as the ladder's rows are: each time in a fresh process, round after round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from detr_fast.console import Console
from detr_fast.option_groups import Idle, Options
from detr_fast.runtime import choose_device, choose_precision, missing_for_compile
from detr_profiling.baselines.build import REFERENCE
from detr_profiling.batches import batch_shapes
from detr_profiling.limits.counting import count_work
from detr_profiling.limits.peaks import measure_peaks
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.measuring.row import LadderRow
from detr_profiling.measuring.techniques import start
from detr_profiling.own_workload import build_workload
from detr_profiling.pages.formats import number
from detr_profiling.pages.ladder import baseline_sections
from detr_profiling.pages.results import RACE_FILE
from detr_profiling.pages.terminal import show
from detr_profiling.rounds import Entry, RoundOptions, Rounds, exit_code, measure_into
from detr_profiling.workload import WorkloadOptions

EAGER_BASELINES = (REFERENCE, "hf-eager", "hf-sdpa")
"""In float32."""


@dataclass(frozen=True, kw_only=True)
class RaceOptions(Options):
    """Compare ours, as these options ask for it, with the baselines."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("same_settings", lambda o: o.workload.resolved().runtime.device == "cuda", "on a GPU: give --device cpu"),
        Idle(
            "compiled_baseline",
            lambda o: o.compiled_baseline and missing_for_compile() is not None,
            "without a compiler, which doctor tells how to get: give --no-compiled-baseline",
        ),
    )
    compiled_baseline: bool = True
    """Also Hugging Face's DETR compiled, which takes minutes on a CPU."""
    same_settings: bool = True
    """Give the baselines our --host-allocator, which on a CPU keeps freed memory; without, they have glibc's."""

    timing: RoundOptions = RoundOptions()
    workload: WorkloadOptions = WorkloadOptions()


def build_entries(options: RaceOptions) -> list[Entry]:
    """List the eager baselines, the compiled one, the reference in our precision, and ours."""
    ours = options.workload.resolved()
    plain = start(ours)
    if options.same_settings:
        plain = replace(plain, options=plain.options.but(host_allocator=ours.runtime.host_allocator))
    entries = [Entry(name, replace(plain, implementation=name)) for name in EAGER_BASELINES]
    if options.compiled_baseline and missing_for_compile() is None:
        entries.append(Entry("hf-compiled", replace(plain, implementation="hf-compiled")))
    dtype, _ = choose_precision(ours.runtime.precision, choose_device(ours.runtime.device)[0])
    if dtype == torch.bfloat16:
        in_bf16 = replace(plain, options=plain.options.but(precision="bf16"), tf32=True)
        entries.append(Entry("reference bf16", in_bf16))
    return [*entries, Entry("detr_fast", Configuration(ours))]


def fastest_eager_ms(rows: Sequence[LadderRow]) -> float | None:
    """Return the median of the fastest eager baseline, None where none was measured."""
    times = [row.median_ms for row in rows if row.technique in EAGER_BASELINES and row.median_ms is not None]
    return min(times, default=None)


def peak_fraction(options: WorkloadOptions, median_ms: float) -> float:
    """Return the fraction of the device's matrix peak, measured here and now, that a step of that time reaches."""
    workload = build_workload(options.resolved().but(compile=False))
    flop = sum(work.flop for work in count_work(workload.run).values()) / len(batch_shapes(workload.options))
    dtype, _ = choose_precision(options.runtime.precision, workload.device)
    return flop / (median_ms / 1e3) / (measure_peaks(workload.device, dtype).gemm_tflop_s * 1e12)


def main(options: RaceOptions) -> int:
    console = Console()
    rows = measure_into(RACE_FILE, Rounds(build_entries(options), options.timing, console))
    show(baseline_sections(rows), console)
    eager_ms, ours_ms = fastest_eager_ms(rows), rows[-1].median_ms
    if eager_ms and ours_ms:
        console.print(f"{number(eager_ms / ours_ms)} times the fastest eager baseline; ")
        fraction = peak_fraction(options.workload, ours_ms)
        console.print(
            f"{fraction:.0%} of this device's measured matrix peak. {Path(options.timing.output) / RACE_FILE}"
        )
    return exit_code(rows)
