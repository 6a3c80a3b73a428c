"""Reads back what the other commands left in a folder."""

import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from detr_fast.config import UserError, require

TRACE_FILE, PARITY_FILE, LADDER_FILE, RACE_FILE = "trace.json", "parity.json", "ladder.csv", "race.csv"
TUNE_FILE = "tune.json"
CONDITIONS = ("model", "size", "sizes", "batch_size", "threads", "device", "torch", "commit", "date")
"""The columns of a row that tell under which conditions it was measured."""


@dataclass(frozen=True)
class LadderRow:
    """Holds one row of ladder.csv or race.csv; None: not measured, or not known."""

    mode: str
    technique: str
    note: str = ""
    quantity: str = ""
    """What the error is of."""
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    runs: float | None = None
    images_per_second: float | None = None
    speedup: float | None = None
    padding: float | None = None
    """Pixels computed for each pixel of an image."""
    peak_mib: float | None = None
    cpu_seconds_per_image: float | None = None
    energy_j_per_image: float | None = None
    first_run_s: float | None = None
    error: float | None = None
    allowed: float | None = None
    close: bool | None = None
    without_median_ms: float | None = None
    without_q1_ms: float | None = None
    without_q3_ms: float | None = None
    without_runs: float | None = None
    rounds_ms: tuple[float, ...] = ()
    """The median of each round."""
    conditions: tuple[tuple[str, str], ...] = ()
    """Names of CONDITIONS and their values."""

    @classmethod
    def from_text(cls, row: dict[str, str]) -> "LadderRow":
        """Parse a row of the file. Raises ValueError for what is no number, KeyError without mode or technique."""
        numbers = {each.name: decimal(row.get(each.name)) for each in fields(cls) if each.type == float | None}
        return cls(
            mode=row["mode"],
            technique=row["technique"],
            note=row.get("note") or "",
            quantity=row.get("quantity") or "",
            close={"True": True, "False": False}.get(row.get("close") or ""),
            rounds_ms=tuple(float(part) for part in (row.get("round_medians_ms") or "").split()),
            conditions=tuple((name, row[name]) for name in CONDITIONS if row.get(name)),
            **numbers,
        )


@dataclass(frozen=True)
class Results:
    """Holds what was found in one folder; None and (): that file is not there."""

    folder: Path
    trace: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    ladder: tuple[LadderRow, ...] = ()
    race: tuple[LadderRow, ...] = ()
    tune: dict[str, Any] | None = None
    """Mode to the entry of it (`detr_fast.tuning.Tuning`)."""


def load_results(folder: Path) -> Results:
    """Read what is in `folder`. Raises UserError where it is no folder, or a file in it is not what it should be."""
    require(folder.is_dir(), f"{folder} is no folder. Name one that trace, parity or ladder wrote to: --out FOLDER.")
    return Results(
        folder,
        read_object(folder / TRACE_FILE, "trace"),
        read_object(folder / PARITY_FILE, "parity"),
        read_ladder(folder / LADDER_FILE, "ladder"),
        read_ladder(folder / RACE_FILE, "race"),
        read_object(folder / TUNE_FILE, "tune"),
    )


@contextmanager
def reading(path: Path, command: str) -> Iterator[None]:
    """Turn what a file that cannot be read raises into a UserError that tells how to make it anew."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        raise damaged(path, command, str(error)) from error


@contextmanager
def complete(path: Path, command: str) -> Iterator[None]:
    """Do the same for a file that lacks something, as one of another version may."""
    try:
        yield
    except KeyError as error:
        raise damaged(path, command, f"it has no {error}") from error


def damaged(path: Path, command: str, reason: str) -> UserError:
    again = f"Make it anew with python -m detr_profiling {command} --out {path.parent}, or remove it."
    return UserError(f"{path} cannot be used: {reason}. {again}")


def read_object(path: Path, command: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    with reading(path, command):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    return found


def read_ladder(path: Path, command: str) -> tuple[LadderRow, ...]:
    if not path.exists():
        return ()
    with reading(path, command), complete(path, command), path.open(newline="", encoding="utf-8") as file:
        return tuple(LadderRow.from_text(row) for row in csv.DictReader(file, restval=""))


def decimal(text: str | None) -> float | None:
    """Parse a number; None for an empty field, and for NaN and infinity, which are no measurements."""
    value = float(text) if text else None
    return value if value is not None and math.isfinite(value) else None
