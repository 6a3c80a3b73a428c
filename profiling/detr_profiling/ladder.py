"""`python -m detr_profiling ladder`: from the plain reference to everything on, one technique a row.

This is an incremental ablation. What a technique is worth stands twice: as what it adds on its way up, and as what is
lost without it at the top (leave-one-out). A technique that does not run, or whose numbers are wrong, is left out of
the rows above it.

Every row begins with the same photographs on the host, 0.6 of their size in the batch, which are resized on the device
within the step. On a GPU a run is several steps issued back to back, batches being copied one ahead.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from detr_fast.console import Console
from detr_fast.option_groups import Idle, Options
from detr_profiling.baselines.build import REFERENCE
from detr_profiling.measuring.measurement import NO_TIME, Configuration
from detr_profiling.measuring.techniques import start, techniques
from detr_profiling.pages import formats
from detr_profiling.pages.ladder import ladder_sections
from detr_profiling.pages.report import HTML_FILE, MARKDOWN_FILE
from detr_profiling.pages.results import LADDER_FILE
from detr_profiling.pages.terminal import show
from detr_profiling.rounds import Entry, RoundOptions, Rounds, exit_code, measure_into
from detr_profiling.workload import WorkloadOptions, WorkloadRuntimeOptions


@dataclass(frozen=True, kw_only=True)
class TopRuntimeOptions(WorkloadRuntimeOptions):
    """Choose device, precision and backends of the row that the ladder ends at."""

    idle: ClassVar[tuple[Idle, ...]] = ()
    compile: bool = True
    """Compile with torch.compile at the top."""
    capture: tyro.conf.Suppress[Literal[False]] = False
    """On a GPU it is a row of its own."""


@dataclass(frozen=True, kw_only=True)
class LadderOptions(Options):
    """Climb from the plain reference to these options, one technique at a time; `auto` is all that this device has."""

    leave_one_out: bool = True
    """Also measure everything on but one technique."""

    timing: RoundOptions = RoundOptions()
    workload: WorkloadOptions = WorkloadOptions(runtime=TopRuntimeOptions())


def build_entries(options: LadderOptions) -> list[Entry]:
    """Make the reference's entry, then one for each technique that runs on the device."""
    top = options.workload.resolved()
    entries = [Entry(REFERENCE, start(top))]
    entries += [Entry(technique.name, start(top), technique) for technique in techniques(top)]
    configure(entries, options.leave_one_out)
    return entries


def configure(entries: Sequence[Entry], leave_one_out: bool) -> None:
    """Give each entry its configurations: the techniques up to its own, and all but its own; never those of other
    entries that are left out."""
    first, working = entries[0].configuration, [entry for entry in entries[1:] if not entry.is_left_out]
    for index, entry in enumerate(entries[1:], start=1):
        below = [each for each in entries[1:index] if not each.is_left_out]
        entry.configuration, entry.without = with_techniques(first, [*below, entry]), None
    for entry in working if leave_one_out else ():
        rest = with_techniques(first, [each for each in working if each is not entry])
        same = [each.configuration for each in working[-2:]]
        entry.without = rest if rest.implementation == "detr_fast" and rest not in same else None
    if leave_one_out:
        *_, before, top = (entry for entry in entries if not entry.is_left_out)
        top.without = before  # the same configuration


def with_techniques(configuration: Configuration, entries: Iterable[Entry]) -> Configuration:
    for entry in entries:
        if entry.technique is not None:
            configuration = entry.technique.applied(configuration)
    return configuration


def measuring(entries: Sequence[Entry], options: LadderOptions, console: Console) -> Rounds:
    """Measure them in turns; an entry that is broken is left out of those after it."""

    def review(entry: Entry) -> None:
        if reason := why_broken(entry):
            entry.note, entry.is_left_out = f"{reason}; left out of the rows after it", True
            configure(entries, options.leave_one_out)

    return Rounds(entries, options.timing, console, review)


def why_broken(entry: Entry) -> str | None:
    """Say that its technique does not run, or computes something else; None where it does neither, or where the
    techniques after it mean nothing without it."""
    if entry.technique is None or not entry.technique.can_be_left_out or NO_TIME in entry.note:
        return None
    if entry.measured is None:
        return entry.note
    return formats.verdict(False) if entry.measured.close is False else None


def main(options: LadderOptions) -> int:
    console, out = Console(), Path(options.timing.output)
    rows = measure_into(LADDER_FILE, measuring(build_entries(options), options, console))
    show(ladder_sections(rows), console)
    console.print(f"{out / LADDER_FILE}, and as a table and a picture {out / HTML_FILE} and {out / MARKDOWN_FILE}")
    return exit_code(rows)
