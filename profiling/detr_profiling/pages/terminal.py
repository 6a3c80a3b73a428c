"""Renders blocks in a terminal: tables of what it can show beside one another, no charts and nothing that is folded."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.text import Text

from detr_fast.console import Console, legible
from detr_profiling.pages.blocks import BAD, GOOD, NOTABLE, Block, Cell, Chart, Column, Facts, Paragraph, Section, Table

STYLES = {GOOD: "green", BAD: "bold red", NOTABLE: "yellow", "": ""}
MOST_CHARACTERS = 46
"""Longest text of a cell that stays on one line: kernels' names have hundreds of characters."""
LEAST_CHARACTERS = 24
"""Width of a column of words, which may go on in further lines."""
EDGES, GAP = 2, 2
"""Characters around a table, and between two columns."""


def show(sections: Iterable[Section], console: Console) -> None:
    """Print what the report shows of `sections`, as far as a terminal can."""
    for section in sections:
        console.print(Text(f"\n{section.title.upper()}", "bold"))
        for block in section.blocks:
            for part in renderables(block, console.width):
                console.print(part, soft_wrap=False)


def renderables(block: Block, width: int) -> Iterator[RenderableType]:
    """Yield what rich prints of a block; a table wider than `width` goes on in another one, its first column again."""
    match block:
        case Paragraph():
            yield f"{block.text} {block.command}".strip()
        case Facts():
            yield "\n".join((block.title, *(f"{name:>18}  {value}" for name, value in block.pairs)))
        case Table(folded=False):
            yield Text(legible(f"\n{block.title}"), "bold")
            yield from (table_of(block, columns) for columns in fitting(block, width))
        case Table() | Chart():
            pass


def fitting(table: Table, width: int) -> Iterator[list[int]]:
    """Yield the indices of columns that fit beside one another, each time after the first column."""
    widths = [column_width(table, index) for index in range(len(table.columns))]
    chosen, used = [0], EDGES + widths[0]
    for index in range(1, len(widths)):
        if len(chosen) > 1 and used + GAP + widths[index] > width:
            yield chosen
            chosen, used = [0], EDGES + widths[0]
        chosen.append(index)
        used += GAP + widths[index]
    yield chosen


def column_width(table: Table, index: int) -> int:
    """Return the characters that a column takes: those of its longest cell, or of a word in its title."""
    most = LEAST_CHARACTERS if wraps(table, index) else MOST_CHARACTERS
    cells = [min(most, len(row[index].text)) for row in table.rows]
    return max([*cells, *map(len, table.columns[index].title.split())], default=0)


def wraps(table: Table, index: int) -> bool:
    return index > 0 and table.columns[index].style == "words"


def table_of(table: Table, columns: Sequence[int]) -> rich.table.Table:
    shown = rich.table.Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index in columns:
        column = table.columns[index]
        header = textwrap.fill(column.title, max(1, column_width(table, index)))
        justify = "right" if column.style == "figures" else "left"
        shown.add_column(header, justify=justify, vertical="top", no_wrap=not wraps(table, index))  # type: ignore[arg-type]
    for row in table.rows:
        shown.add_row(*(content(row[index], table.columns[index]) for index in columns))
    return shown


def content(cell: Cell, column: Column) -> Text:
    text = cell.text  # of a class or a kernel, it may hold anything
    if column.style == "code" and len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS - 1]}…"
    return Text(legible(text), STYLES[cell.tone])
