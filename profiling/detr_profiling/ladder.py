"""`python -m detr_profiling ladder`: from the plain reference to everything on, one technique a row.

Each measurement is a process of its own. The rows take turns, round after round, so that a machine that becomes slower
does so for all of them; what a technique is worth stands twice, as what it adds on its way up and as what is lost
without it at the top. A technique that does not run, or whose numbers are wrong, is left out of the rows above it.

Every row begins with the same photographs on the host, 0.6 of their size in the batch, which are resized on the device
within the step. On a GPU a run is several steps issued back to back, batches being copied one ahead.
"""

import csv
import io
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table

from detr_fast.config import Idle, UserError, require
from detr_fast.console import Console
from detr_fast.files import require_writable, write_text
from detr_profiling.measuring.machine import describe_machine
from detr_profiling.measuring.measurement import Configuration, Measurement, measure_in_process, write_oracle_in_process
from detr_profiling.measuring.techniques import Technique, start, techniques
from detr_profiling.measuring.timing import Timing
from detr_profiling.pages import formats
from detr_profiling.pages.formats import number
from detr_profiling.pages.ladder import remarks
from detr_profiling.pages.results import LADDER_FILE, load_results
from detr_profiling.report import HTML_FILE, MARKDOWN_FILE, write_report
from detr_profiling.tracing.tables import plain_table
from detr_profiling.workload import WorkloadOptions

REFERENCE = "reference"


@dataclass(frozen=True, kw_only=True)
class LadderOptions(WorkloadOptions):
    """Climb from the plain reference to these options, one technique at a time; `auto` is all that this device has."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *(one for one in WorkloadOptions.idle if one.option != "capture"),
        Idle("capture", lambda o: True, "in the ladder, where it is a row of its own on a GPU: run race or trace"),
    )
    compile: bool = True
    """Compile with torch.compile at the top."""
    out: str = "runs/profile"
    """Folder for ladder.csv, and the report that shows it."""
    runs: int = 5
    """Timed runs of a row in each round."""
    rounds: int = 2
    """Times that all rows are measured anew, one after another."""
    leave_one_out: bool = True
    """Also measure everything on but one technique."""
    minutes: float | None = None
    """Leave out, and say so, what would end later."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.runs >= 1 and self.rounds >= 1, "--runs and --rounds must be at least 1.")


@dataclass(eq=False)
class Rung:
    """One row: a technique added to those before it, and everything on without it."""

    technique: str
    configuration: Configuration
    added: Technique | None = None
    """What it adds to the row before; None: nothing that could be left out of the rows after it."""
    without: Configuration | None = None
    """None where the top does not exist without it, or is the same."""
    measured: Measurement | None = None
    measured_without: Measurement | None = None
    round_medians_ms: list[float] = field(default_factory=list)
    note: str = ""
    """Why something was not measured."""


def build_rungs(top: WorkloadOptions, leave_one_out: bool = True) -> list[Rung]:
    """The reference, then a row for each technique that runs on the device of `top`."""
    top = top.resolved()
    rungs = [Rung(REFERENCE, start(top))]
    rungs += [Rung(technique.name, start(top), technique) for technique in techniques(top)]
    configure(rungs, leave_one_out)
    return rungs


def configure(rungs: list[Rung], leave_one_out: bool, broken: Sequence[Rung] = ()) -> None:
    """Gives each row its configurations: the techniques up to its own, and all but its own; never those of other rows
    that are `broken`."""
    first, working = rungs[0].configuration, [rung for rung in rungs[1:] if rung not in broken]
    for rung in rungs[1:]:
        before = [each for each in rungs[1 : rungs.index(rung)] if each in working]
        rung.configuration = climb(first, [*before, rung])
    for rung in working if leave_one_out else ():
        rest = climb(first, [each for each in working if each is not rung])
        exists = rest.implementation == "detr_fast" and rest.keeps_memory
        # the top without its last technique is the row before it, and is measured as that
        same = [working[-1].configuration, *(each.configuration for each in working[-2:-1])]
        rung.without = rest if exists and rest not in same else None
    for rung in broken:
        rung.without = None


def climb(configuration: Configuration, steps: Iterable[Rung]) -> Configuration:
    for rung in steps:
        if rung.added is not None:
            configuration = rung.added.applied(configuration)
    return configuration


class Clock:
    """The time that is left, judged by what each row took before."""

    def __init__(self, minutes: float | None) -> None:
        self.ends = time.perf_counter() + minutes * 60 if minutes else None
        self.longest_s = 0.0

    @property
    def left_s(self) -> float | None:
        """None: without an end."""
        return None if self.ends is None else self.ends - time.perf_counter()

    def allows(self) -> bool:
        return self.left_s is None or self.longest_s < self.left_s

    def took(self, seconds: float) -> None:
        self.longest_s = max(self.longest_s, seconds)


def measure_rungs(rungs: list[Rung], options: LadderOptions, say: Console) -> Iterator[None]:
    """Fills the rungs: round 1, what is lost without each, then the further rounds of both, while there is time. Yields
    after each measurement."""
    clock, broken = Clock(options.minutes), list[Rung]()
    with tempfile.TemporaryDirectory() as folder:
        oracle = Path(folder)
        write_oracle_in_process(rungs[0].configuration.options, oracle)
        for number in range(options.rounds):
            for rung in (each for each in rungs if each not in broken):
                measure_rung(rung, options.runs, oracle, clock, say, number)
                if number == 0 and is_broken(rung):
                    broken.append(rung)
                    configure(rungs, options.leave_one_out, broken)
                yield
            for rung in rungs:
                measure_without(rung, options.runs, oracle, clock, say)
                yield
    if options.leave_one_out:
        *_, before, top = (rung for rung in rungs if rung not in broken)
        top.measured_without = before.measured  # without the last technique is the row before
        yield


def measure_rung(rung: Rung, runs: int, oracle: Path, clock: Clock, say: Console, number: int) -> None:
    found = attempt(rung.configuration, rung, runs, oracle if number == 0 else None, clock)
    if found:
        rung.measured = rung.measured.joined(found) if rung.measured else found
        rung.round_medians_ms.append(found.timing.median_ms)
        say.print(f"round {number + 1}  {rung.technique:24} {found.timing.text()} ms")


def is_broken(rung: Rung) -> bool:
    """Tells whether its technique does not run, or computes something else; the note then says that the rest goes on
    without it."""
    if rung.added is None or not rung.added.can_be_left_out or "no time left" in rung.note:
        return False
    if rung.measured and rung.measured.close is not False:
        return False
    reason = formats.verdict(False) if rung.measured else rung.note
    rung.note = f"{reason}; left out of the rows after it"
    return True


def measure_without(rung: Rung, runs: int, oracle: Path, clock: Clock, say: Console) -> None:
    if rung.without is None:
        return
    first = rung.measured_without is None
    found = attempt(rung.without, rung, runs, oracle if first else None, clock)
    if found:
        rung.measured_without = found if first else rung.measured_without.joined(found)  # type: ignore[union-attr]
        say.print(f"without  {rung.technique:24} {found.timing.text()} ms")


def attempt(
    configuration: Configuration, rung: Rung, runs: int, oracle: Path | None, clock: Clock
) -> Measurement | None:
    """None, with a note on the rung, where there is no time left or the configuration does not run."""
    if not clock.allows():
        rung.note = rung.note or "not all measured: no time left"
        return None
    began = time.perf_counter()
    try:
        found = measure_in_process(configuration, runs, oracle, clock.left_s)
    except UserError as error:
        rung.note = str(error)
        return None
    clock.took(time.perf_counter() - began)
    return found


def rows_of(rungs: Sequence[Rung], options: WorkloadOptions) -> list[dict[str, Any]]:
    """One flat row a rung, as ladder.csv holds it; what was not measured is missing."""
    options = options.resolved()
    machine = describe_machine(torch.device(options.device))
    first = rungs[0].measured
    place = {
        **{name: getattr(options, name) for name in ("model", "size", "sizes", "batch_size", "threads")},
        **{name: getattr(machine, name) for name in ("device", "commit", "date")},
        "torch": machine.versions["torch"],
    }
    rows = []
    for rung in rungs:
        row: dict[str, Any] = {"mode": options.mode, "technique": rung.technique, "note": rung.note}
        if found := rung.measured:
            row |= timing_columns(found.timing) | {
                "images_per_second": 1e3 * (options.batch_size or 1) / found.timing.median_ms,
                "speedup": first.timing.median_ms / found.timing.median_ms if first else None,
                "first_run_s": found.first_run_s,
                **{name: value for name, value in asdict(found).items() if name not in ("timing", "first_run_s")},
            }
        if lost := rung.measured_without:
            row |= timing_columns(lost.timing, "without_")
        rounds = " ".join(f"{value:.4g}" for value in rung.round_medians_ms)
        rows.append(row | {"round_medians_ms": rounds, "precision": rung.configuration.options.precision} | place)
    return rows


def timing_columns(timing: Timing, prefix: str = "") -> dict[str, float]:
    names = ("median_ms", "q1_ms", "q3_ms", "runs")
    return {f"{prefix}{name}": getattr(timing, name) for name in names}


COLUMNS = (
    *("mode", "technique", "median_ms", "q1_ms", "q3_ms", "runs", "images_per_second", "speedup", "padding"),
    *("peak_mib", "cpu_seconds_per_image", "energy_j_per_image", "first_run_s", "error", "allowed", "quantity"),
    *("close", "without_median_ms", "without_q1_ms", "without_q3_ms", "without_runs", "round_medians_ms", "note"),
    *("steps_a_run", "precision", "model", "size", "sizes", "batch_size", "threads", "device", "torch", "commit"),
    "date",
)


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """As CSV, numbers with six digits; what other modes had there stays."""
    kept = [row for row in read_rows(path) if row["mode"] not in {each["mode"] for each in rows}]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(kept)
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items() if v is not None})
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of ladder.csv, as text; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rungs: Sequence[Rung]) -> Table:
    """For the terminal."""
    titles = ["ms", "spread", "speedup", "padding", "peak MiB", "error", "without"]
    shown = plain_table("technique", titles, "From the reference to everything on")
    shown.add_column("")
    first = rungs[0].measured
    for rung in rungs:
        shown.add_row(rung.technique, *(figures(rung, first) or [""] * len(titles)), rung_verdict(rung))
    return shown


def figures(rung: Rung, first: Measurement | None) -> list[str] | None:
    """None where the rung was not measured."""
    if rung.measured is None:
        return None
    timing, lost = rung.measured.timing, rung.measured_without
    return [
        number(timing.median_ms),
        number(timing.q3_ms - timing.q1_ms, digits=2),
        number(first.timing.median_ms / timing.median_ms if first else None),
        number(rung.measured.padding),
        number(rung.measured.peak_mib),
        formats.error(rung.measured.error),
        number(lost.timing.median_ms) if lost else "",
    ]


def rung_verdict(rung: Rung) -> str:
    return rung.note or (formats.verdict(rung.measured.close) if rung.measured else "")


def main(options: LadderOptions) -> int:
    console = Console()
    rungs = build_rungs(options, options.leave_one_out)
    out = Path(options.out)
    require_writable("--out", out)
    for _ in measure_rungs(rungs, options, console):
        write_rows(rows_of(rungs, options), out / LADDER_FILE)
    write_report(out)
    console.print(table(rungs))
    for line in remarks([row for row in load_results(out).ladder if row.mode == options.mode]):
        console.print(line)
    console.print(f"{out / LADDER_FILE}, and as a table and a picture {out / HTML_FILE} and {out / MARKDOWN_FILE}")
    return 0 if all(rung.measured and rung.measured.close is not False for rung in rungs) else 1
