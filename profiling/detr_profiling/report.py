"""`python -m detr_profiling report`: one HTML page and its Markdown twin from what trace, parity and ladder left."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.files import write_text
from detr_profiling.measuring.row import PLACE, LadderRow
from detr_profiling.pages import formats
from detr_profiling.pages import trace as report_trace
from detr_profiling.pages.ladder import by_mode, ladder_blocks, ladder_timing, race_blocks
from detr_profiling.pages.overview import (
    FILES,
    command_blocks,
    findings,
    heading,
    machine_blocks,
    missing,
    reading_blocks,
)
from detr_profiling.pages.page import Block, Section
from detr_profiling.pages.parity import parity_blocks
from detr_profiling.pages.results import (
    RACE_FILE,
    SCALING_FILE,
    TUNE_FILE,
    Results,
    complete,
    load_results,
)
from detr_profiling.pages.scaling import scaling_blocks
from detr_profiling.pages.tuning import tuning_blocks

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
README_TITLES = ("step", "", "ms (spread, runs)", "images/s", "speedup", "peak MiB", "error", "verdict")
MEASURED: tuple[tuple[str, str, Callable[[Any], Iterable[Block]]], ...] = (
    ("ladder", "Ladder", ladder_blocks),
    ("trace", "Stages", report_trace.stages_blocks),
    ("trace", "Waits and operators", report_trace.waits_blocks),
    ("trace", "Memory", report_trace.memory_blocks),
    ("trace", "Roofline", report_trace.roofline_blocks),
    ("parity", "Parity", parity_blocks),
    ("trace", "GPU telemetry", report_trace.telemetry_blocks),
    ("trace", "Forms", report_trace.forms_blocks),
)
"""The sections of figures: from which part, under which title, by whom."""


@dataclass(frozen=True)
class ReportOptions:
    """One HTML page and its Markdown twin from what the other commands left."""

    out: str = "runs/profile"
    """Folder with trace.json, parity.json and ladder.csv, or some of them; the report is written there."""
    readme: str | None = None
    """Also put the tables of ladder and race into this Markdown file, between its lines `<!-- measured: begin -->` and
    `<!-- measured: end -->`."""


def sections(results: Results) -> Iterator[Section]:
    """In the order of the page; what is not there says how to get it."""
    machine = machine_blocks(results)
    if machine or not results.tune:  # which says itself where it was
        yield Section("Machine and versions", machine)
    if results.race:
        with complete(results.folder / RACE_FILE, "race"):
            yield Section("Beside others", list(race_blocks(results.race)))
    if results.tune:
        with complete(results.folder / TUNE_FILE, "tune"):
            yield Section("Fastest here", list(tuning_blocks(results.tune)))
    for part, title, build in MEASURED:
        found = getattr(results, part)
        with complete(results.folder / FILES[part], part):
            yield Section(title, list(build(found)) if found else [missing(results, part)])
    if results.scaling:
        with complete(results.folder / SCALING_FILE, "scaling"):
            yield Section("Many GPUs", list(scaling_blocks(results.scaling)))
    yield Section("How to read it", reading_blocks())
    yield Section("Commands", command_blocks(results))


def render_html(results: Results) -> str:
    """One page without scripts that fetches nothing. Raises UserError where a file lacks what its command writes."""
    return render("report.html.j2", results)


def render_markdown(results: Results) -> str:
    """The same figures without the pictures. Raises UserError as `render_html` does."""
    return render("report.md.j2", results)


def render(template: str, results: Results) -> str:
    content = {"sections": list(sections(results)), "title": heading(results), "findings": findings(results)}
    return templates().get_template(template).render(**content)


@cache
def templates() -> Environment:
    """Both escape by themselves; what the filter `markdown` returns needs no more of it."""
    loader = PackageLoader("detr_profiling", "pages/templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["markdown"] = markdown
    return environment


def markdown(text: object) -> Markup:
    """Any text as itself in one line of Markdown, in a table too: nothing in it becomes markup, a link or HTML."""
    line = re.sub(r"[\\`|*\[\]~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\\g<0>", " ".join(str(text).split()))
    return Markup(re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;"))


def readme_table(results: Results) -> str:
    """Lay out the comparison with baselines, where there is one, and the ladder, in Markdown. Raises UserError without
    a ladder."""
    require(
        bool(results.ladder),
        f"There is no ladder.csv in {results.folder} to make the table of. Measure it: "
        f"python -m detr_profiling ladder --out {results.folder}",
    )
    tables = [part for part in (results.race, results.ladder) if part]
    return "\n".join("\n".join(table_lines(part)) + "\n" for part in tables)


def table_lines(rows: Sequence[LadderRow]) -> Iterator[str]:
    """Where it was measured, and a line for each row."""
    yield from (*places(rows), "", table_line(README_TITLES), f"|---|---|{'---:|' * 5}---|")
    for row in rows:
        figures = (formats.number(each) for each in (row.images_per_second, row.speedup, row.peak_mib))
        judged = (formats.error(row.error), formats.verdict(row.close))
        yield table_line((row.mode, row.technique, ladder_timing(row), *figures, *judged))


def table_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(markdown(cell) for cell in cells)} |"


def places(ladder: Sequence[LadderRow]) -> list[str]:
    """What was measured, where and when: one line, or one for each mode where they differ."""
    modes: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for mode, rows in by_mode(ladder).items():
        modes.setdefault(rows[0].place, []).append(mode)
    lines = []
    for place, names in modes.items():
        known = {name: markdown(dict(place).get(name, formats.NOT_KNOWN)) for name in PLACE}
        mixed = ", mixed sizes" if known["sizes"] == "mixed" else ""
        lines.append(
            "{model}, {size} px{mixed}, {batch_size} a step, {modes}: {device}, {threads} threads, torch {torch}, "
            "{date}, commit {commit}.".format(modes=markdown(" and ".join(names)), mixed=mixed, **known)
        )
    return lines


def put_into_readme(table: str, path: Path) -> None:
    """Between its two marks, which stay. Raises UserError where they are not there, once and in order."""
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
    """Writes FOLDER/report.html and report.md. Raises UserError where its results cannot be used."""
    results = load_results(folder)
    for name, render_as in ((HTML_FILE, render_html), (MARKDOWN_FILE, render_markdown)):
        write_text(folder / name, render_as(results), errors="replace")


def main(options: ReportOptions) -> None:
    folder = Path(options.out)
    write_report(folder)
    if options.readme is not None:
        put_into_readme(readme_table(load_results(folder)), Path(options.readme))
    Console().print(f"{folder / HTML_FILE} opens in any browser, without a network.")
