"""What a report consists of, before it is HTML or Markdown: sections of facts, tables and pictures, all plain text.

Both templates show the same sections, so that their figures cannot differ; escaping is theirs alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

GOOD, BAD, NOTABLE = "good", "bad", "notable"


@dataclass(frozen=True)
class Cell:
    text: str
    tone: str = ""
    """GOOD, BAD or NOTABLE where colour may repeat what the text says."""

    def __str__(self) -> str:
        return self.text


class Column(NamedTuple):
    title: str
    style: str
    """Figures stand at the right; words and code, which keeps its letters' width, at the left."""


def words(*titles: str) -> list[Column]:
    return [Column(title, "words") for title in titles]


def code(*titles: str) -> list[Column]:
    return [Column(title, "code") for title in titles]


def figures(*titles: str) -> list[Column]:
    return [Column(title, "figures") for title in titles]


@dataclass(frozen=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str
    command: str = ""
    """Shown after it, as something to type."""


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and what there is to say."""

    kind: ClassVar[str] = "facts"
    title: str
    pairs: list[tuple[str, str]]
    prose: bool = False
    """Sentences, not single words."""


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as columns. The first cell names its row."""

    kind: ClassVar[str] = "table"
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    hues: list[str] = field(default_factory=list)
    """Of each row in the picture beside it, or none."""
    folded: bool = False
    """Too long to stand open."""


class Key(NamedTuple):
    """What a colour or a number in a picture stands for."""

    hue: str
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Picture:
    """SVG that is safe as it is: charts.py has escaped what is in it."""

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str
    keys: list[Key] = field(default_factory=list)


@dataclass(frozen=True)
class Gallery:
    """Small pictures beside one another."""

    kind: ClassVar[str] = "gallery"
    pictures: list[Picture]


Block = Paragraph | Facts | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def cells(*contents: str | Cell) -> list[Cell]:
    return [each if isinstance(each, Cell) else Cell(each) for each in contents]


def judged(text: str, close: bool | None) -> Cell:
    return Cell(text, {True: GOOD, False: BAD, None: ""}[close])


def capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def sentence(clauses: Iterable[str]) -> str:
    """All that are not empty as one, with a capital letter."""
    text = "; ".join(clause for clause in clauses if clause)
    return f"{capital(text)}." if text else ""
