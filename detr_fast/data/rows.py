"""Checks of the rows of a COCO json: the message names the first row that is wrong, and how many there are."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from detr_fast.config import UserError, require
from detr_fast.data.corrections import shortened

LARGEST_NUMBER = 2**53
"""Beyond it float64 does not hold every whole number; NaN and infinities fail the comparison with it as well."""


Row = dict[str, Any]


def name_of(row: Row, position: int) -> int | str:
    """Return what messages call a row: its id, or its position in the file, counted from 0."""
    id_ = row.get("id")
    if type(id_) is int and abs(id_) < LARGEST_NUMBER:
        return id_
    return f"number {position}" if id_ is None else f"{id_!s:.100}"


def require_rows(file: Path, kind: str, rows: Sequence[Row], good: Callable[[Row], bool], key: str, must: str) -> None:
    """Raise UserError where some of `rows` are not `good`: what the first one's `key` `must` be, is, and how many."""
    wrong = [position for position, row in enumerate(rows) if not good(row)]
    if wrong:
        first = rows[wrong[0]]
        found = "but is null or missing" if first.get(key) is None else f"not {first[key]!r:.100}"
        refuse_row(file, kind, rows, wrong, f"{key!r} must be {must}, {found}.")


def refuse_row(file: Path, kind: str, rows: Sequence[Row], wrong: Sequence[int], fault: str) -> NoReturn:
    """Raise UserError that names the first of the `wrong` indices into `rows`, its `fault`, and how many there are."""
    more = f" So it is with {len(wrong)} of {len(rows)}." if len(wrong) > 1 else ""
    raise UserError(f"{file}: {kind} {name_of(rows[wrong[0]], wrong[0])}: {fault}{more}")


def whole_numbers(file: Path, rows: Sequence[Row], kind: str, key: str) -> np.ndarray:
    """Read `key` of all rows as (rows,) int64, also from floats without a fraction.

    Raises UserError that names the first row whose `key` is missing or no whole number, and how many there are.
    """
    values = [row.get(key) for row in rows]
    if not all(type(value) is int and abs(value) < LARGEST_NUMBER for value in values):
        values = [whole(value) for value in values]
    wrong = [position for position, value in enumerate(values) if value is None]
    if wrong:
        refuse_row(file, kind, rows, wrong, f"{key!r} {why_not_whole(rows[wrong[0]].get(key), key)}")
    return np.array(values, dtype=np.int64)


def whole(value: Any) -> int | None:
    """Return `value` as an int, if it is a whole number that float64 holds; None for anything else."""
    if type(value) not in (int, float) or not abs(value) < LARGEST_NUMBER or value != int(value):
        return None
    return int(value)


def why_not_whole(value: Any, key: str) -> str:
    """Say why `value` is no whole number that can be used, and what to do about it."""
    is_id = key.endswith("id")
    if type(value) is int:
        advice = "Number them 1, 2, ... in the file, wherever they stand" if is_id else "Correct it"
        return (
            f"{value!s:.40} is too large: at most {LARGEST_NUMBER - 1} (2**53 - 1), since evaluation computes in "
            f"float64, as COCO's own tools do, where larger numbers run into each other. {advice}."
        )
    if isinstance(value, str):
        advice = " Number them 1, 2, ... in the file, wherever they stand." if is_id else " Write it without quotes."
        return f"must be a whole number, not the text {value!r:.100}{': ids in COCO json are numbers' * is_id}.{advice}"
    return f"must be a whole number, {'but is null or missing' if value is None else f'not {value!r:.100}'}."


def refuse_duplicates(file: Path, kind: str, ids: Iterable[int]) -> None:
    duplicate = [str(id_) for id_, count in Counter(ids).items() if count > 1]
    require(not duplicate, f"{file}: {kind} ids must be distinct; more than once: {shortened(duplicate, 10)}.")


def refuse_negative(file: Path, kind: str, ids: Sequence[int]) -> None:
    negative = [str(id_) for id_ in ids if id_ < 0]
    require(not negative, f"{file}: {kind} {shortened(negative, 5)}: ids must not be negative.")


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, and no bool or text."""
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER
