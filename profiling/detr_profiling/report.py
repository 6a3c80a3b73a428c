"""`python -m detr_profiling report`: one HTML page and its Markdown twin from what trace, parity and ladder left."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.files import write_text
from detr_fast.option_groups import Options
from detr_fast.options import Output
from detr_profiling.measuring.row import LadderRow
from detr_profiling.pages.blocks import Block, Paragraph, Report, Section, Table, capital
from detr_profiling.pages.html import render_html
from detr_profiling.pages.ladder import README_COLUMNS, baseline_sections, conditions_of, ladder_sections, readme_cells
from detr_profiling.pages.markdown import CHARTS_FOLDER, block_lines, render_markdown
from detr_profiling.pages.overview import (
    FILES,
    command_blocks,
    findings,
    heading,
    machine_blocks,
    missing,
    reading_blocks,
)
from detr_profiling.pages.parity import parity_sections
from detr_profiling.pages.results import RACE_FILE, TUNE_FILE, Results, complete, load_results
from detr_profiling.pages.trace import trace_sections
from detr_profiling.pages.tuning import tuning_sections

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PARTS: tuple[tuple[str, str, Callable[[Any], Iterable[Section]]], ...] = (
    ("race", RACE_FILE, baseline_sections),
    ("tune", TUNE_FILE, tuning_sections),
    ("ladder", FILES["ladder"], ladder_sections),
    ("trace", FILES["trace"], trace_sections),
    ("parity", FILES["parity"], parity_sections),
)
"""Each command that leaves figures, its file, and what makes sections of them."""


@dataclass(frozen=True)
class ReportOptions(Options):
    """Make one HTML page and its Markdown twin from what the other commands left."""

    output: Output = "runs/profile"
    """Folder with trace.json, parity.json and ladder.csv, or some of them; the report is written there."""
    readme: str | None = None
    """Also put the tables of ladder and race into this Markdown file, between its lines `<!-- measured: begin -->` and
    `<!-- measured: end -->`."""


def make_report(results: Results) -> Report:
    """Make the report's blocks. Raises UserError where a file lacks what its command writes."""
    shown = list(sections(results))  # before what is read of them, as they name a file that lacks something
    return Report(heading(results), findings(results), shown)


def sections(results: Results) -> Iterator[Section]:
    """Yield the sections in the order of the page; what is not there says how to get it."""
    machine = machine_blocks(results)
    if machine or not results.tune:  # whose section tells the machine
        yield Section("Machine and versions", machine)
    for name, file, make in PARTS:
        if found := getattr(results, name):
            with complete(results.folder / file, name):
                yield from list(make(found))
        elif name in FILES:
            yield Section(capital(name), [missing(results, name)])
    yield Section("How to read it", reading_blocks())
    yield Section("Commands", command_blocks(results))


def readme_table(results: Results) -> str:
    """Return race, where there is one, and ladder as a README's tables. Raises UserError without a ladder."""
    require(
        bool(results.ladder),
        f"There is no ladder.csv in {results.folder} to make the table of. Measure it: "
        f"python -m detr_profiling ladder --output {results.folder}",
    )
    blocks = [block for part in (results.race, results.ladder) if part for block in readme_blocks(part)]
    return "\n".join([*block_lines(blocks), ""]).lstrip("\n")


def readme_blocks(rows: Sequence[LadderRow]) -> Iterator[Block]:
    """Yield where it was measured, and a table with a line for each row."""
    yield from map(Paragraph, conditions_of(rows))
    yield Table("", README_COLUMNS, [readme_cells(row) for row in rows])


def put_into_readme(table: str, path: Path) -> None:
    """Write the table between two marks, which stay. Raises UserError where they are not there, once and in order."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme {path} cannot be read: {error}.") from error
    begin, end = text.find(BEGIN), text.find(END)
    require(
        0 <= begin < end and text.count(BEGIN) == text.count(END) == 1,
        f"{path} needs one line {BEGIN} and, below it, one line {END}: the table goes between them.",
    )
    write_text(path, f"{text[: begin + len(BEGIN)]}\n{table}{text[end:]}")


def write_report(folder: Path) -> None:
    """Write FOLDER/report.html, report.md and its charts. Raises UserError where the results cannot be used."""
    report = make_report(load_results(folder))
    files = {HTML_FILE: render_html(report), MARKDOWN_FILE: render_markdown(report)}
    files |= {f"{CHARTS_FOLDER}/{chart.name}.svg": chart.svg for chart in report.charts()}
    for name, text in files.items():
        write_text(folder / name, text, errors="replace")


def main(options: ReportOptions) -> None:
    folder = Path(options.output)
    write_report(folder)
    if options.readme is not None:
        put_into_readme(readme_table(load_results(folder)), Path(options.readme))
    Console().print(f"{folder / HTML_FILE} opens in any browser, without a network.")
