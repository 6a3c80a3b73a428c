"""The report of a folder: blocks of everything that the commands left there, as one HTML page and Markdown."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from detr_fast.files import write_text
from detr_profiling.pages.accuracy import accuracy_sections
from detr_profiling.pages.blocks import Report, Section, capital
from detr_profiling.pages.html import render_html
from detr_profiling.pages.ladder import baseline_sections, ladder_sections
from detr_profiling.pages.markdown import CHARTS_FOLDER, render_markdown
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
from detr_profiling.pages.results import ACCURACY_FILE, RACE_FILE, TUNE_FILE, Results, complete, load_results
from detr_profiling.pages.trace import trace_sections
from detr_profiling.pages.tuning import tuning_sections

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
PARTS: tuple[tuple[str, str, Callable[[Any], Iterable[Section]]], ...] = (
    ("accuracy", ACCURACY_FILE, accuracy_sections),
    ("race", RACE_FILE, baseline_sections),
    ("tune", TUNE_FILE, tuning_sections),
    ("ladder", FILES["ladder"], ladder_sections),
    ("trace", FILES["trace"], trace_sections),
    ("parity", FILES["parity"], parity_sections),
)
"""Each command that leaves figures, its file, and what makes sections of them."""


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


def write_report(folder: Path) -> None:
    """Write FOLDER/report.html, report.md and its charts. Raises UserError where the results cannot be used."""
    report = make_report(load_results(folder))
    files = {HTML_FILE: render_html(report), MARKDOWN_FILE: render_markdown(report)}
    files |= {f"{CHARTS_FOLDER}/{chart.name}.svg": chart.svg for chart in report.charts()}
    for name, text in files.items():
        write_text(folder / name, text, errors="replace")
