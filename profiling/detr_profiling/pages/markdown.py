"""Renders blocks as Markdown: charts are files beside it, nothing in any text becomes markup, a link or HTML."""

import re
from collections.abc import Iterable, Iterator

from detr_profiling.pages.blocks import Block, Cell, Chart, Facts, Paragraph, Report, Table

CHARTS_FOLDER = "charts"
"""Beside the Markdown file: NAME.svg of each chart."""


def render_markdown(report: Report) -> str:
    """Return a report whose charts are to be written to CHARTS_FOLDER."""
    findings = "; ".join(f"{escape(name)}: {escape(found)}" for name, found in report.findings)
    lines = [f"# {escape(report.title)}", "", findings]
    for section in report.sections:
        lines += ["", f"## {escape(section.title)}", *block_lines(section.blocks)]
    return "\n".join(lines) + "\n"


def block_lines(blocks: Iterable[Block]) -> Iterator[str]:
    """Yield the lines of each block after an empty one."""
    for block in blocks:
        yield ""
        match block:
            case Paragraph():
                yield escape(f"{block.text} {block.command}".strip())
            case Facts():
                yield from [f"**{escape(block.title)}**", ""] if block.title else []
                yield from (f"- {escape(name)}: {escape(value)}" for name, value in block.pairs)
            case Chart():
                yield f"**{escape(block.title)}**"
                yield ""
                yield f"![{escape(block.description)}]({CHARTS_FOLDER}/{block.name}.svg)"
            case Table(folded=True):
                yield from (f"<details><summary>{escape(block.title, in_html=True)}</summary>", "")
                yield from (*table_lines(block), "", "</details>")
            case Table():
                yield from [f"**{escape(block.title)}**", ""] if block.title else []
                yield from table_lines(block)


def table_lines(table: Table) -> Iterator[str]:
    yield table_line(column.title for column in table.columns)
    yield f"|{'|'.join('---:' if column.style == 'figures' else '---' for column in table.columns)}|"
    yield from map(table_line, table.rows)


def table_line(cells: Iterable[str | Cell]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def escape(text: object, in_html: bool = False) -> str:
    """Return any text as itself in one line of Markdown, in a table too, or in an HTML element within it."""
    line = " ".join(str(text).split())
    if in_html:
        return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"[\\`|*\[\]~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\\g<0>", line)
    return re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")
