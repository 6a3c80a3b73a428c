"""One row of ladder.csv or race.csv: what the commands write, the tables show and the report reads back."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from detr_fast.files import write_text

CONDITIONS = ("model", "size", "size_mix", "batch_size", "threads", "device", "torch", "commit", "date")
"""The columns that tell under which conditions a row was measured."""


@dataclass(frozen=True)
class LadderRow:
    """A configuration's measurements; its fields are the file's columns. None: not measured, or not known."""

    mode: str
    technique: str
    """The technique that the row adds, in the ladder; the implementation, in race."""
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    runs: float | None = None
    images_per_second: float | None = None
    speedup: float | None = None
    """Over the first row."""
    padding: float | None = None
    """Pixels computed for each that is an image's."""
    peak_mib: float | None = None
    cpu_seconds_per_image: float | None = None
    energy_j_per_image: float | None = None
    first_run_s: float | None = None
    error: float | None = None
    allowed: float | None = None
    quantity: str = ""
    """Name of the quantity whose error it is."""
    close: bool | None = None
    without_median_ms: float | None = None
    """Median time with everything on but this technique (leave-one-out); likewise the next three."""
    without_q1_ms: float | None = None
    without_q3_ms: float | None = None
    without_runs: float | None = None
    rounds_ms: tuple[float, ...] = ()
    """The median of each round; column `round_medians_ms`."""
    note: str = ""
    """Why something was not measured."""
    steps_a_run: float | None = None
    precision: str = ""
    model: str = ""
    size: str = ""
    size_mix: str = ""
    batch_size: str = ""
    threads: str = ""
    device: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""

    @property
    def conditions(self) -> tuple[tuple[str, str], ...]:
        """Pair the names of CONDITIONS with what the row says of them, where it does."""
        return tuple((name, getattr(self, name)) for name in CONDITIONS if getattr(self, name))

    @classmethod
    def from_text(cls, row: dict[str, str]) -> Self:
        """Read a row of the file. Raises ValueError for what is no number, KeyError without mode or technique."""
        if missing := {"mode", "technique"} - row.keys():
            raise KeyError(min(missing))
        found = {each.name: parsed(each.type, row.get(column(each.name)) or "") for each in fields(cls)}
        return cls(**found)

    def to_text(self) -> dict[str, str]:
        """Give each column its text, numbers with six digits."""
        return {column(each.name): text(getattr(self, each.name)) for each in fields(self)}


def column(field: str) -> str:
    return {"rounds_ms": "round_medians_ms"}.get(field, field)


def parsed(kind: Any, value: str) -> Any:
    """Read a field of type `kind`; NaN and infinity, which are no measurements, become None."""
    if kind is str:
        return value
    if kind == bool | None:
        return {"True": True, "False": False}.get(value)
    if kind == tuple[float, ...]:
        return tuple(map(float, value.split()))
    number = float(value) if value else math.nan
    return number if math.isfinite(number) else None


def text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{each:.4g}" for each in value)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def read_rows(path: Path) -> list[LadderRow]:
    """Read a file of rows. Raises OSError, csv.Error, and what `LadderRow.from_text` does."""
    with path.open(newline="", encoding="utf-8") as file:
        return [LadderRow.from_text(row) for row in csv.DictReader(file, restval="")]


def write_rows(rows: Iterable[LadderRow], path: Path) -> None:
    """Replace the file at `path`. Raises UserError where it cannot be written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [column(each.name) for each in fields(LadderRow)])
    writer.writeheader()
    writer.writerows(row.to_text() for row in rows)
    write_text(path, text.getvalue())
