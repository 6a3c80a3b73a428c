"""Reads back what the other commands left in a folder."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.config import UserError, require
from detr_profiling.measuring.row import LadderRow, read_rows

TRACE_FILE, PARITY_FILE, LADDER_FILE, RACE_FILE = "trace.json", "parity.json", "ladder.csv", "race.csv"
TUNE_FILE, ACCURACY_FILE = "tune.json", "accuracy.json"


@dataclass(frozen=True)
class Results:
    """Holds what was found in one folder; None and (): that file is not there."""

    folder: Path
    trace: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    ladder: tuple[LadderRow, ...] = ()
    race: tuple[LadderRow, ...] = ()
    accuracy: dict[str, Any] | None = None
    tune: dict[str, Any] | None = None
    """Mode to the entry of it (`detr_fast.tuning.Tuning`)."""


def load_results(folder: Path) -> Results:
    """Read what is in `folder`. Raises UserError where it is no folder, or a file in it is not what it should be."""
    require(folder.is_dir(), f"{folder} is no folder. Name one that trace, parity or ladder wrote to: --output FOLDER.")
    return Results(
        folder,
        read_object(folder / TRACE_FILE, "trace"),
        read_object(folder / PARITY_FILE, "parity"),
        read_ladder(folder / LADDER_FILE, "ladder"),
        read_ladder(folder / RACE_FILE, "race"),
        read_object(folder / ACCURACY_FILE, "accuracy"),
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
    again = f"Make it anew with python -m detr_profiling {command} --output {path.parent}, or remove it."
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
    with reading(path, command), complete(path, command):
        return tuple(read_rows(path))
