"""Configurations measured in turns, round after round, each time in a fresh process: what ladder and race are made of.

A machine that becomes slower does so for all of them. A configuration that does not run says why, and the others go on.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.files import require_writable
from detr_fast.option_groups import Options
from detr_fast.options import Output
from detr_profiling.measuring.machine import describe_machine
from detr_profiling.measuring.measurement import (
    NO_TIME,
    Configuration,
    Measurement,
    measure_in_process,
    write_references_in_process,
)
from detr_profiling.measuring.row import LadderRow, write_rows
from detr_profiling.measuring.techniques import Technique
from detr_profiling.pages.report import write_report
from detr_profiling.pages.results import read_ladder


@dataclass(frozen=True, kw_only=True)
class RoundOptions(Options):
    """Say how often each row is measured, and where the rows go."""

    output: Output = "runs/profile"
    """Folder for the rows as CSV, and the report that shows them."""
    runs: int = 5
    """Timed runs of a row in each round."""
    rounds: int = 2
    """Times that all rows are measured anew, one after another."""
    minutes: float | None = None
    """Leave out, and say so, what would end later."""

    def __post_init__(self) -> None:
        require(self.runs >= 1 and self.rounds >= 1, "--runs and --rounds must be at least 1.")


@dataclass(eq=False)
class Entry:
    """Holds one configuration that takes turns, and what was measured of it."""

    name: str
    configuration: Configuration
    technique: Technique | None = None
    """The technique that it adds to the entry before; None: nothing that could be left out of the entries after it."""
    without: "Configuration | Entry | None" = None
    """Everything on but its technique: a configuration that is measured too, or the entry that is the same."""
    measured: Measurement | None = None
    left_without: Measurement | None = None
    """Measurement of the configuration `without`; None where that is an entry, which has its own."""
    rounds_ms: list[float] = field(default_factory=list)
    note: str = ""
    """Why something was not measured."""
    is_left_out: bool = False
    """It is not measured again."""

    @property
    def measured_without(self) -> Measurement | None:
        return self.without.measured if isinstance(self.without, Entry) else self.left_without


class TimeLimit:
    """Judges the time that is left by the longest measurement so far."""

    def __init__(self, minutes: float | None) -> None:
        self.ends_s = time.perf_counter() + minutes * 60 if minutes else None
        self.longest_s = 0.0

    @property
    def left_s(self) -> float | None:
        """Return the seconds that are left, None without an end."""
        return None if self.ends_s is None else self.ends_s - time.perf_counter()

    def allows_another(self) -> bool:
        return self.left_s is None or self.longest_s < self.left_s


@dataclass(frozen=True)
class Rounds:
    """Measures entries, one after another."""

    entries: Sequence[Entry]
    options: RoundOptions
    console: Console
    review: Callable[[Entry], None] = lambda entry: None
    """Called after each entry's first measurement; may leave it out, and change the configurations of later ones."""

    def run(self) -> Iterator[None]:
        """Measure while there is time; yields after each measurement."""
        limit = TimeLimit(self.options.minutes)
        with tempfile.TemporaryDirectory() as folder:
            references = Path(folder)
            write_references_in_process(self.entries[0].configuration.options, references)
            for number in range(self.options.rounds):
                for entry in (each for each in self.entries if not each.is_left_out):
                    self._measure(entry, references if number == 0 else None, limit, number)
                    if number == 0:
                        self.review(entry)
                    yield
                for entry in self.entries:
                    if isinstance(entry.without, Configuration):
                        self._measure_without(entry, entry.without, references, limit)
                        yield

    def _measure(self, entry: Entry, references: Path | None, limit: TimeLimit, number: int) -> None:
        if found := self._attempt(entry, entry.configuration, references, limit):
            entry.measured = entry.measured.joined(found) if entry.measured else found
            entry.rounds_ms.append(found.timing.median_ms)
            self.console.print(f"round {number + 1}  {entry.name:24} {found.timing.text()} ms")

    def _measure_without(self, entry: Entry, without: Configuration, references: Path, limit: TimeLimit) -> None:
        before = entry.left_without
        if found := self._attempt(entry, without, None if before else references, limit):
            entry.left_without = before.joined(found) if before else found
            self.console.print(f"without  {entry.name:24} {found.timing.text()} ms")

    def _attempt(
        self, entry: Entry, configuration: Configuration, references: Path | None, limit: TimeLimit
    ) -> Measurement | None:
        """Return None, with a note on the entry, where no time is left or the configuration does not run."""
        if not limit.allows_another():
            entry.note = entry.note or f"not all measured: {NO_TIME}"
            return None
        began_s = time.perf_counter()
        try:
            found = measure_in_process(configuration, self.options.runs, references, limit.left_s)
        except UserError as error:
            entry.note = str(error)
            return None
        limit.longest_s = max(limit.longest_s, time.perf_counter() - began_s)
        return found


def measure_into(file: str, rounds: Rounds) -> list[LadderRow]:
    """Measure, writing --output's `file` after each measurement and the report at the end; returns the rows.

    Rows of another mode stay in the file. Raises UserError where it cannot be read or written.
    """
    path, mode = Path(rounds.options.output) / file, rounds.entries[0].configuration.options.mode
    kept = [row for row in read_ladder(path, path.stem) if row.mode != mode]
    require_writable("--output", path.parent)
    for _ in rounds.run():
        write_rows([*kept, *rows_of(rounds.entries)], path)
    write_report(path.parent)
    return rows_of(rounds.entries)


def exit_code(rows: Sequence[LadderRow]) -> int:
    """Return 0 where every row was measured and none is far from the reference, else 1."""
    return 0 if all(row.median_ms is not None and row.close is not False for row in rows) else 1


def rows_of(entries: Sequence[Entry]) -> list[LadderRow]:
    """Make a row of each entry, with the machine and the commit that this is."""
    options = entries[0].configuration.options.to_dict()
    machine = describe_machine(torch.device(options["device"]))
    names = ("model", "size", "size_mix", "batch_size", "threads")
    place: dict[str, Any] = {name: str(options[name]) for name in names}
    place |= {name: getattr(machine, name) or "" for name in ("device", "commit", "date")}
    place["torch"] = machine.versions["torch"] or ""
    return [row_of(entry, entries[0].measured, place) for entry in entries]


def row_of(entry: Entry, first: Measurement | None, place: dict[str, Any]) -> LadderRow:
    """Make a row; `first` is what its speedup is over."""
    options, found, lost = entry.configuration.options, entry.measured, entry.measured_without
    figures: dict[str, Any] = lost.timing.columns("without_") if lost else {}
    if found:
        others = {name: value for name, value in asdict(found).items() if name not in ("timing", "quantity")}
        figures |= found.timing.columns() | others | {"quantity": found.quantity or ""}
        figures["images_per_second"] = 1e3 * (options.batch_size or 1) / found.timing.median_ms
        figures["speedup"] = first.timing.median_ms / found.timing.median_ms if first else None
    return LadderRow(
        options.mode,
        entry.name,
        note=entry.note,
        rounds_ms=tuple(entry.rounds_ms),
        precision=options.runtime.precision,
        **figures,
        **place,
    )
