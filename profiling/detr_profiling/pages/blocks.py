"""The blocks of which a report is made, before it is HTML, Markdown or lines in a terminal: all text is plain text.

Every renderer shows the same blocks, so that their figures cannot differ; escaping is theirs alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

from matplotlib.figure import Figure

from detr_profiling.pages.charts import svg_of
from detr_profiling.pages.formats import NOT_KNOWN

GOOD, BAD, NOTABLE = "good", "bad", "notable"


@dataclass(frozen=True)
class Cell:
    """Holds a text, and a tone where colour may repeat what the text says: GOOD, BAD or NOTABLE."""

    text: str
    tone: str = ""

    def __str__(self) -> str:
        return self.text


class Column(NamedTuple):
    """Holds a column's title and its style: "figures" are aligned right, "words" and "code" left."""

    title: str
    style: str


def words(*titles: str) -> list[Column]:
    return [Column(title, "words") for title in titles]


def code(*titles: str) -> list[Column]:
    return [Column(title, "code") for title in titles]


def figures(*titles: str) -> list[Column]:
    return [Column(title, "figures") for title in titles]


@dataclass(frozen=True)
class Paragraph:
    """Shows sentences, and after them a command to type."""

    kind: ClassVar[str] = "paragraph"
    text: str
    command: str = ""


@dataclass(frozen=True)
class Facts:
    """Shows pairs of a name and a value; `prose`: values are whole sentences."""

    kind: ClassVar[str] = "facts"
    title: str
    pairs: list[tuple[str, str]]
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """Shows rows of as many cells as columns; the first cell names its row. `folded`: too long to be shown open."""

    kind: ClassVar[str] = "table"
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """Shows a matplotlib figure, drawn when a renderer needs it; its numbers are in a table beside it too."""

    kind: ClassVar[str] = "chart"
    name: str
    """Unique in a report, and a file's name."""
    title: str
    description: str
    """The text alternative."""
    draw: Callable[[], Figure]

    @cached_property
    def svg(self) -> str:
        return svg_of(self.draw)


Block = Paragraph | Facts | Table | Chart


@dataclass(frozen=True)
class Section:
    """Puts blocks under a heading."""

    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Report:
    """Holds a title, what was found in one line each, and the sections."""

    title: str
    findings: list[tuple[str, Cell]]
    sections: list[Section]

    def charts(self) -> list[Chart]:
        return [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]


def without_unknown(table: Table) -> Table:
    """Leave out the columns in which no row has a value."""
    known = [
        index
        for index in range(len(table.columns))
        if index == 0 or any(row[index].text != NOT_KNOWN for row in table.rows)
    ]
    rows = [[row[index] for index in known] for row in table.rows]
    return replace(table, columns=[table.columns[index] for index in known], rows=rows)


def cells(*contents: str | Cell) -> list[Cell]:
    return [each if isinstance(each, Cell) else Cell(each) for each in contents]


def judged(text: str, close: bool | None) -> Cell:
    return Cell(text, {True: GOOD, False: BAD, None: ""}[close])


def capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def sentence(clauses: Iterable[str]) -> str:
    """Join all clauses that are not empty, with a capital letter and a full stop."""
    text = "; ".join(clause for clause in clauses if clause)
    return f"{capital(text)}." if text else ""
