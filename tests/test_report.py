"""The report: every part is in it, as text, with the figures that were measured, in HTML and Markdown alike."""

import base64
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from detr_profiling.pages.html import render_html as html_of
from detr_profiling.pages.markdown import render_markdown as markdown_of
from detr_profiling.pages.report import make_report
from detr_profiling.pages.results import Results, load_results
from detr_profiling.report import ReportOptions, main
from markdown_it import MarkdownIt

from tests.sample_results import ladder_rows, parity, trace, write_results
from tests.test_charts import contrast

HOSTILE = "<script>alert(1)</script>"
SECTIONS = [
    *("Machine and versions", "Ladder", "Profiler ranges", "Synchronisations and operators", "Memory", "Roofline"),
    *("GPU telemetry", "Backends", "Parity", "How to read it", "Commands"),
]
MARKDOWN_TAGS = {
    *("h1", "h2", "p", "strong", "ul", "li", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "img"),
}


def render_html(results: Results) -> str:
    return html_of(make_report(results))


def render_markdown(results: Results) -> str:
    return markdown_of(make_report(results))


class Page(HTMLParser):
    """What a browser would find: elements with attributes, texts by the element around them, tables by their title."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[list[str], str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)
        if tag == "div" and dict(attributes).get("class") == "scroll":
            self._rows = self.tables.setdefault(str(dict(attributes)["aria-label"]), [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((list(self._open), data))
        if {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def said(self, tag: str) -> list[str]:
        return [data for open_tags, data in self.texts if open_tags[-1:] == [tag]]

    def row(self, title: str, first: str) -> list[str]:
        return next(row for row in self.tables[title] if row[0] == first)


class Twin(Page):
    """The same of Markdown, as a reader of it renders it: HTML within it stays HTML."""

    def __init__(self, text: str) -> None:
        super().__init__(MarkdownIt("commonmark").enable("table").render(text))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            titles = [data for tags, data in self.texts if {"strong", "summary"} & set(tags)]
            self._rows = self.tables.setdefault(titles[-1], [])
        super().handle_starttag(tag, attributes)


@cache
def html(folder: Path) -> str:
    """What a folder gives, drawn once."""
    return render_html(load_results(folder))


@cache
def page_of(folder: Path) -> Page:
    return Page(html(folder))


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ladder = ladder_rows() + ladder_rows("inference", faster=3.1)
    return write_results(tmp_path_factory.mktemp("cpu"), trace=trace(), parity=parity(), ladder=ladder)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("gpu"), trace=trace(gpu=True), parity=parity(), ladder=ladder_rows())


def test_every_section_is_there_in_order(cpu: Path, gpu: Path) -> None:
    for folder in (cpu, gpu):
        page, twin = page_of(folder), Twin(render_markdown(load_results(folder)))
        assert page.said("h2") == page.said("a") == twin.said("h2") == SECTIONS
        modes = 2 if folder == cpu else 1
        assert len(charts(page)) == modes + 3 + 4 + 1  # ladder, trace, outputs of four variants, curve
        shown = [str(attributes["src"]) for tag, attributes in twin.elements if tag == "img"]
        main(ReportOptions(str(folder)))
        assert [(folder / source).read_bytes() for source in shown] == charts(page), "they lie beside the Markdown"
        for tag, attributes in (*page.elements, *twin.elements):
            assert tag != "img" or attributes["alt"]


def charts(page: Page) -> list[bytes]:
    """The SVG within a page."""
    sources = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2]) for source in sources]


def test_the_summary_says_what_was_found(cpu: Path, gpu: Path) -> None:
    summary = render_markdown(load_results(cpu)).splitlines()[2]
    for found in (
        "training ladder: 2.27 times as fast: everything on takes 402 ms (14, 10 runs), reference 912 ms (25, 10 runs)",
        "inference ladder: 2.27 times as fast: everything on takes 130 ms (4.7, 10 runs)",
        "parity: holds in 4 variants",
        "largest profiler range: backward, 42.6 % of a step",
        "device synchronisations: 7 reads a step would wait for a GPU",
        "peak memory: 1,187 MiB in backward by aten::convolution_backward",
    ):
        assert found in summary
    assert "device synchronisations: 0 a step" in render_markdown(load_results(gpu))
    assert page_of(cpu).said("dd")[0].startswith("2.27 times as fast")


def test_figures_are_those_that_were_measured(cpu: Path) -> None:
    page = page_of(cpu)
    assert page.row("Training: time", "reference") == [
        "reference",
        "912 (25, 10 runs)",
        "1.10",
        "1.00",
        "0",
        "",
        "n/a",
        "n/a",
        "7",
    ]
    compiled = ["compile", "402 (14, 10 runs)", "2.49", "2.27", "0", "−18 %", "488 (9.8, 10 runs)", "1.22", "1"]
    assert page.row("Training: time", "compile") == compiled
    costs = ["compile", "1,238", "0.763", "31.2", "logits", "0.014", "54", "close"]
    assert page.row("Training: memory, energy, exactness", "compile") == costs
    assert page.row("Inference: time", "compile")[1] == "130 (4.7, 10 runs)"
    ranges = page.tables["Own time of each profiler range, without the ranges within it; 3 profiled steps"]
    assert ranges[3] == ["backbone", "142 (4.3, 3 runs)", "35.3"], "without the device's time, which a CPU has not"
    assert sum(round(10 * float(row[2])) for row in ranges[1:]) == 1000
    assert page.row("Device synchronisations by operation and profiler range", "aten::item") == [
        "aten::item",
        "optimizer",
        "1",
    ]
    operator = ["aten::convolution_backward", "53", "90.0", "21.0"]
    assert page.row("Operators by their own time in a step", "aten::convolution_backward") == operator
    roof = ["optimizer", "0.300", "640", "25.3", "31.4", "memory", "0.808", "0.9"]
    assert page.row("Work, time and roofline bound of each profiler range", "optimizer") == roof
    assert page.row("fp32: all 62", "matches") == ["matches", "match", "0", "0", "1.0e-6", "0", "close"]
    assert page.row("Average precision: close", "bf16") == ["bf16", "0.7468", "0.9608"]
    assert page.row("AP by class", "star") == ["star", "n/a"]


def test_a_gpu_shows_kernels_telemetry_and_idleness(gpu: Path) -> None:
    page = page_of(gpu)
    assert page.row("Sampled during the timed steps", "power, W") == ["power, W", "512", "564"]
    kernel = "sm90_xmma_gemm_bf16bf16_0<float, 0>"
    assert page.row("Kernels by their own time in a step", kernel) == [kernel, "12", "3.00", "30.0"]
    said = " ".join(page.said("p"))
    for part in (
        "the device is idle for 4.1 % of it",
        "THROTTLED: power cap",
        "251 J",
        "Device synchronisations: 0 a step",
    ):
        assert part in said


def test_the_twin_has_the_same_tables(cpu: Path, gpu: Path) -> None:
    for folder in (cpu, gpu):
        tables = page_of(folder).tables
        assert len(tables) > 15
        assert Twin(render_markdown(load_results(folder))).tables == tables


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    parts = {"trace": trace(), "parity": parity(), "ladder": ladder_rows()}
    for absent in parts:
        place = absent.capitalize()
        folder = write_results(tmp_path / absent, **{name: part for name, part in parts.items() if name != absent})
        command = f"python -m detr_profiling {absent} --output {folder}"
        assert under_headings(page_of(folder), command) == [place, "Commands"]
        twin = Twin(render_markdown(load_results(folder)))
        assert under_headings(twin, command) == [place, "Commands"]
        assert under_headings(twin, f"It comes from {command}") == [place]
        options = next(row[1] for row in twin.tables["What makes each part"] if command in row[1])
        assert "--size 320x427" in options and "--steps" not in options, "a trace's own options are its alone"


def under_headings(page: Page, text: str) -> list[str]:
    """Titles of the sections that say `text`."""
    title, found = "", []
    for tags, data in page.texts:
        title = data if "h2" in tags else title
        if text in data and title not in found:
            found.append(title)
    return found


def test_an_empty_folder_gives_a_report(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert "not measured yet: ladder, trace, parity" in render_markdown(load_results(tmp_path))
    assert page_of(tmp_path).said("h2") == [
        *("Machine and versions", "Ladder", "Trace", "Parity", "How to read it", "Commands")
    ]


def hostile(value: Any) -> Any:
    """Every text in it, and every name that the measured one chose, is one that a browser would run."""
    if isinstance(value, dict):
        chosen = ("backends", "losses", "samples", "error_histogram", "versions")
        return {
            key: {f"{HOSTILE}{name}": hostile(each) for name, each in part.items()} if key in chosen else hostile(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return f"{HOSTILE}{value}" if isinstance(value, str) else value


def hostile_results(folder: Path, gpu: bool = False) -> Path:
    rows = [{key: hostile(value) for key, value in row.items() if key != "round_medians_ms"} for row in ladder_rows()]
    return write_results(folder, trace=hostile(trace(gpu)), parity=hostile(parity()), ladder=rows)


@pytest.mark.parametrize("gpu", [False, True])
def test_names_are_text_and_nothing_else(tmp_path: Path, gpu: bool) -> None:
    text = render_html(load_results(hostile_results(tmp_path / HOSTILE[1:7], gpu)))
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section", "h1", "h2", "h3", "p"),
        *("a", "dl", "div", "dt", "dd", "table", "caption", "span", "thead", "tbody", "tr", "th", "td", "code"),
        *("figure", "figcaption", "img", "details", "summary"),
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset")]
        assert (attributes.get("href") or "#").startswith("#")
        assert HOSTILE not in str(attributes.get("class")), tag
    outside = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"https?:|//|url\(|@import|src=", outside)
    in_charts = b" ".join(charts(page))
    assert in_charts.count(HOSTILE.replace("<", "&lt;").replace(">", "&gt;").encode()) > 20
    assert b"<script" not in in_charts
    for said in (f"{HOSTILE}star", f"{HOSTILE}aten::cdist", f"{HOSTILE}channels-last", f"{HOSTILE}bf16 compiled"):
        assert said in " ".join(data for _, data in page.texts)


def test_markdown_shows_names_as_they_are(tmp_path: Path) -> None:
    text = render_markdown(load_results(hostile_results(tmp_path)))
    twin = Twin(text)
    assert {tag for tag, _ in twin.elements} == MARKDOWN_TAGS
    assert "<script" not in text
    assert twin.row("AP by class", f"{HOSTILE}star") == [f"{HOSTILE}star", "n/a"]


def test_markup_of_markdown_in_names(tmp_path: Path) -> None:
    names = ["a|b", "`x`", "\\", "\\|", "[here](nowhere)", "__init__", "*x*", "&lt;", "two\nlines", "<!-- x", "<b>"]
    changed = parity()
    changed["ap"]["classes"] = [{"name": name, "AP": 0.5} for name in names]
    twin = Twin(render_markdown(load_results(write_results(tmp_path, parity=changed))))
    assert twin.tables["AP by class"][1:] == [[" ".join(name.split()), "0.5000"] for name in names]
    assert {tag for tag, _ in twin.elements} == MARKDOWN_TAGS


def test_every_text_can_be_read(cpu: Path) -> None:
    style = html(cpu).partition("<style>")[2].partition("</style>")[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style))
    for name in ("ink", "quiet", "link", "good", "bad", "notable"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def test_results_twice_give_the_same_bytes(cpu: Path) -> None:
    written = []
    for _ in range(2):
        main(ReportOptions(str(cpu)))
        written.append([(cpu / name).read_bytes() for name in ("report.html", "report.md")])
    assert written[0] == written[1]


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    large = trace()
    large["memory"]["curve"] = [[i * 0.731, 900 + 300 * math.sin(i)] for i in range(2000)]
    folder = write_results(tmp_path, trace=large, parity=parity(gradients=300), ladder=ladder_rows())
    assert len(render_html(load_results(folder)).encode()) < 1.5e6


def test_what_is_bad_is_said_loudly(tmp_path: Path) -> None:
    leaking, far, rows = trace(), parity(), ladder_rows()
    leaking["memory"] |= {"leaking": True, "growth_mib_per_step": 12.25}
    far["variants"][2]["rows"][3] |= {"error": None, "close": False}  # NaN, as JSON has it
    far["variants"][2]["rows"][5] |= {"error": 0.9, "close": False}  # of the same kind
    far["variants"][2]["close"] = far["close"] = False
    rows[6] |= {"close": False, "error": float("nan")}
    text = render_markdown(load_results(write_results(tmp_path, trace=leaking, parity=far, ladder=rows)))
    summary = text.splitlines()[2]
    assert "parity: does NOT hold: bf16;" in summary
    assert "it GROWS by 12.2 MiB with every step: a leak" in summary
    twin = Twin(text)
    assert under_headings(twin, "NOT close to the reference: compile") == ["Ladder"]
    assert under_headings(twin, "bf16 is NOT close in backbone layer4") == ["Parity"]
    table = twin.tables["bf16: NOT close; of each kind the nearest to its limit, and all that are past it"]
    assert ["backbone layer4", "block", "n/a", "0.024", "0.049", "n/a", "NOT close"] in table
    assert ["encoder 1", "block", "0.90", "0.037", "0.073", "1,229", "NOT close"] in table


def test_a_slower_row_stays_and_says_so(cpu: Path) -> None:
    page = page_of(cpu)
    assert page.row("Training: time", "channels-last")[1:6] == [
        "672 (12, 10 runs)",
        "1.49",
        "1.36",
        "0",
        "+2.5 %, IQRs overlap",
    ]
    said = " ".join(page.said("p"))
    assert "slower than the row before: channels-last" in said
    assert "2 rounds, not in the same order in every one: bf16 and channels-last" in said
    assert ("notable", "+2.5 %, IQRs overlap") in tones(cpu)


def tones(folder: Path) -> list[tuple[str, str]]:
    text = html(folder)
    return re.findall(r'<td class="\w+ (\w+)">([^<]*)</td>', text)


def test_rows_without_a_measurement(tmp_path: Path) -> None:
    rows = ladder_rows()
    place = {key: rows[0][key] for key in ("mode", "model", "size", "device")}
    rows[-1] = {"technique": "compile", "note": "not all measured: no time left", **place}
    page = page_of(write_results(tmp_path, ladder=rows))
    assert page.row("Training: time", "compile")[1:6] == ["n/a"] * 4 + ["not all measured: no time left"]
    said = " ".join(page.said("p"))
    assert (
        "all up to folded batch norm takes 488 ms" in said
        and "not measured: compile (not all measured: no time left)" in said
    )
    write_results(tmp_path, ladder=[{"technique": "reference", "note": "killed", **place}])
    assert "training ladder: nothing was measured" in render_markdown(load_results(tmp_path))


def test_parts_from_two_commits_are_not_passed_off_as_one(tmp_path: Path, cpu: Path) -> None:
    changed = parity()
    changed["machine"]["commit"] = "0000000"
    folder = write_results(tmp_path / "two", trace=trace(), parity=changed)
    said = "NOT all parts were measured on one machine and commit; trace on AMD EPYC 9B14 at commit 28d3f62; parity on"
    assert said in render_markdown(load_results(folder))
    assert "NOT all parts" not in render_markdown(load_results(cpu))


def test_commands_make_the_parts_again(cpu: Path) -> None:
    rows = page_of(cpu).tables["What makes each part"][1:]
    size = "--size 320x427 --batch-size 1"
    assert [row[1] for row in rows] == [
        f"python -m detr_profiling ladder --output {cpu} {size} --threads 2",
        f"python -m detr_profiling ladder --output {cpu} --mode inference {size} --threads 2",
        f"python -m detr_profiling trace --output {cpu} {size} --device cpu --precision bf16 --compile --steps 3",
        f"python -m detr_profiling parity --output {cpu} {size} --device cpu",
        f"python -m detr_profiling report --output {cpu}",
    ]


def test_parts_that_a_trace_may_lack(tmp_path: Path) -> None:
    bare = trace() | {
        "memory": None,
        "roofline": None,
        "backends": {},
        "synchronizations": [],
        "synchronizations_per_step": 0.0,
    }
    text = render_markdown(load_results(write_results(tmp_path, trace=bare)))
    assert "The trace has no allocations" in text and "n/a: this trace has none" in text
    unfinished = parity() | {"variants": [], "curve": None, "ap": None, "samples": {}, "error_histogram": {}}
    text = render_markdown(load_results(write_results(tmp_path, parity=unfinished)))
    assert "parity: nothing was compared" in text


def test_a_trace_without_the_gpus_events_is_not_read_as_a_cpus(tmp_path: Path) -> None:
    host_alone = trace(gpu=True) | {"idle_fraction": None, "kernels": [], "roofline": None, "problem": "no events here"}
    folder = write_results(tmp_path / "lacking", trace=host_alone)
    shown = render_markdown(load_results(folder))
    assert shown.count("NOT complete: no events here") == 2, "in the summary, and beside the figures"
    assert "operators a step read on the host; others are not known" in shown
    assert "on a CPU none does" not in shown
    assert "Memory handed out by the GPU&#39;s allocator" in render_html(load_results(folder))
