"""The report's section on accuracy against seconds of training: curves, a table, and what differs beyond the seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

from detr_profiling.pages.blocks import (
    BAD,
    GOOD,
    Block,
    Cell,
    Chart,
    Paragraph,
    Section,
    Table,
    cells,
    code,
    figures,
    sentence,
    words,
)
from detr_profiling.pages.charts import accuracy_curves
from detr_profiling.pages.formats import NOT_KNOWN

Point = tuple[float, float, float]
"""Seconds of training, AP, AP50."""
AT_FRACTIONS = (0.2, 0.5, 1.0)
"""Parts of the budget that the table has a column for."""


@dataclass(frozen=True)
class AccuracyRun:
    """A run of one configuration with one seed."""

    configuration: str
    seed: int
    minutes: float
    points: tuple[Point, ...]
    note: str = ""
    """Why there are no points."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "points": tuple(tuple(point) for point in values["points"])})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        if self.note or not self.points:
            return self.note or "no evaluation"
        _, ap, ap50 = self.points[-1]
        return f"AP50 {ap50:.3f}  AP {ap:.3f}  area {self.area():.3f}"

    def at(self, seconds: float, column: int = 2) -> float:
        """Return AP50 (or AP, column 1) of the last evaluation until then; before the first 0."""
        return next((point[column] for point in reversed(self.points) if point[0] <= seconds), 0.0)

    def final(self, column: int = 2) -> float:
        return self.points[-1][column] if self.points else math.nan

    def area(self) -> float:
        """Return the mean of AP50 over the budget, each value from its evaluation to the next."""
        ends = [point[0] for point in self.points[1:]] + [60 * self.minutes]
        held = (max(0.0, end - point[0]) * point[2] for point, end in zip(self.points, ends, strict=True))
        return sum(held) / (60 * self.minutes)


def accuracy_sections(found: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the section of accuracy.json's content."""
    runs = [AccuracyRun.from_dict(each) for each in found["runs"]]
    names = list(dict.fromkeys(run.configuration for run in runs))
    groups = {name: [run for run in runs if run.configuration == name and run.points] for name in names}
    minutes, seeds = found["minutes"], len({run.seed for run in runs})
    judge = "its own validation or test images"
    if found["val_fraction"]:
        judge = f"{found['val_fraction']:.0%} of its training images, set apart"
    about = [
        f"{found['data']}, {minutes:g} minutes of training each, evaluations apart; {seeds} seeds",
        f"judged on {judge}",
        "a difference is called one where no seed of the one reaches any of the other",
    ]
    blocks: list[Block] = [Paragraph(sentence(about))]
    curves = {name: [run.points for run in group] for name, group in groups.items() if group}
    if curves:
        described = "; ".join(f"{name} {spread(group, 2)}" for name, group in groups.items() if group)
        blocks.append(
            Chart("accuracy", "AP50 against seconds of training", described, lambda: accuracy_curves(curves, minutes))
        )
    blocks.append(accuracy_table(groups, minutes))
    notes = [f"{run.configuration}, seed {run.seed}: {run.note}" for run in runs if run.note]
    blocks += [Paragraph(f"NOT measured: {note}.") for note in notes]
    yield Section("Accuracy", blocks)


def accuracy_table(groups: Mapping[str, Sequence[AccuracyRun]], minutes: float) -> Table:
    first = next(iter(groups.values()))
    at = [f"AP50 after {minutes * fraction:g} min" for fraction in AT_FRACTIONS[:-1]]
    columns = [
        *code("configuration"),
        *figures(*at, "AP50", "AP", "area under AP50", "runs"),
        *words("against the first"),
    ]
    rows = []
    for name, group in groups.items():
        early = [ranged([run.at(60 * minutes * fraction) for run in group]) for fraction in AT_FRACTIONS[:-1]]
        last = [spread(group, 2), spread(group, 1), ranged([run.area() for run in group])]
        rows.append(cells(name, *early, *last, str(len(group)), Cell("") if group is first else verdict(group, first)))
    return Table("Median over the seeds (least to most)", columns, rows)


def spread(group: Sequence[AccuracyRun], column: int) -> str:
    return ranged([run.final(column) for run in group])


def ranged(values: Sequence[float]) -> str:
    if not values:
        return NOT_KNOWN
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def verdict(group: Sequence[AccuracyRun], first: Sequence[AccuracyRun]) -> Cell:
    """Compare the areas under AP50 with the first configuration's: a difference, or within the seeds' range."""
    mine, others = ([run.area() for run in runs] for runs in (group, first))
    if not mine or not others:
        return Cell(NOT_KNOWN)
    if min(mine) > max(others):
        return Cell("better", GOOD)
    return Cell("worse", BAD) if max(mine) < min(others) else Cell("within the seeds' range")
