"""`python -m detr_profiling report`: one HTML page and its Markdown twin from what trace, parity and ladder left."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.files import write_text
from detr_fast.option_groups import Options
from detr_fast.options import Output
from detr_profiling.measuring.row import LadderRow
from detr_profiling.pages.blocks import Block, Paragraph, Table
from detr_profiling.pages.ladder import README_COLUMNS, conditions_of, readme_cells
from detr_profiling.pages.markdown import block_lines
from detr_profiling.pages.report import HTML_FILE, write_report
from detr_profiling.pages.results import Results, load_results

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class ReportOptions(Options):
    """Make one HTML page and its Markdown twin from what the other commands left."""

    output: Output = "runs/profile"
    """Folder with trace.json, parity.json and ladder.csv, or some of them; the report is written there."""
    readme: str | None = None
    """Also put the tables of ladder and race into this Markdown file, between its lines `<!-- measured: begin -->` and
    `<!-- measured: end -->`."""


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


def main(options: ReportOptions) -> None:
    folder = Path(options.output)
    write_report(folder)
    if options.readme is not None:
        put_into_readme(readme_table(load_results(folder)), Path(options.readme))
    Console().print(f"{folder / HTML_FILE} opens in any browser, without a network.")
