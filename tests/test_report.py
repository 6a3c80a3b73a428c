"""The report: every part is in it, as text, with the figures that were measured, in HTML and Markdown alike."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from detr_profiling.pages.results import load_results
from detr_profiling.report import ReportOptions, main, render_html, render_markdown
from markdown_it import MarkdownIt

from detr_fast.stages import STAGES
from tests.sample_results import ladder_rows, parity, trace, write_results

HOSTILE = "<script>alert(1)</script>"
SECTIONS = [
    *("Machine and versions", "Ladder", "Stages", "Waits and operators", "Memory", "Roofline", "Parity"),
    *("GPU telemetry", "Forms", "How to read it", "Commands"),
]
MARKDOWN_TAGS = {
    *("h1", "h2", "p", "strong", "ul", "li", "details", "summary", "table", "thead", "tbody", "tr", "th", "td"),
}
OF_THE_TRACE = ("Stages", "Waits and operators", "Memory", "Roofline", "GPU telemetry", "Forms")


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
        if tag not in ("meta", "br"):
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


@pytest.fixture
def cpu(tmp_path: Path) -> Path:
    ladder = ladder_rows() + ladder_rows("inference", faster=3.1)
    return write_results(tmp_path / "cpu", trace=trace(), parity=parity(), ladder=ladder)


@pytest.fixture
def gpu(tmp_path: Path) -> Path:
    return write_results(tmp_path / "gpu", trace=trace(gpu=True), parity=parity(), ladder=ladder_rows())


def test_every_section_is_there_in_order(cpu: Path, gpu: Path) -> None:
    for folder in (cpu, gpu):
        page, twin = Page(render_html(load_results(folder))), Twin(render_markdown(load_results(folder)))
        assert page.said("h2") == page.said("a") == twin.said("h2") == SECTIONS
        pictures = [attributes["class"] for tag, attributes in page.elements if tag == "svg" and "class" in attributes]
        modes = 2 if folder == cpu else 1
        assert pictures == ["bars"] * (modes + 1) + ["plot"] * (2 + 2 * 4 + 1)


def test_the_summary_says_what_was_found(cpu: Path, gpu: Path) -> None:
    summary = render_markdown(load_results(cpu)).splitlines()[2]
    for found in (
        "training: 2.27 times as fast: everything on takes 402 ms (14, 10 runs), reference 912 ms (25, 10 runs)",
        "inference: 2.27 times as fast: everything on takes 130 ms (4.7, 10 runs)",
        "parity: holds in 4 variants",
        "largest stage: backward, 42.6 % of a step",
        "host waits: 7 reads a step would wait for a GPU",
        "peak memory: 1,187 MiB in backward by aten::convolution_backward",
    ):
        assert found in summary
    assert "host waits: 0 a step" in render_markdown(load_results(gpu))
    assert Page(render_html(load_results(cpu))).said("dd")[0].startswith("2.27 times as fast")


def test_figures_are_those_that_were_measured(cpu: Path) -> None:
    page = Page(render_html(load_results(cpu)))
    assert page.row("Training: time", "reference") == [
        "reference",
        "912 (25, 10 runs)",
        "1.10",
        "1.00",
        "1.00",
        "",
        "n/a",
        "n/a",
        "7",
    ]
    compiled = ["compile", "402 (14, 10 runs)", "2.49", "2.27", "1.00", "−18 %", "488 (9.8, 10 runs)", "1.22", "1"]
    assert page.row("Training: time", "compile") == compiled
    costs = ["compile", "1,238", "n/a", "0.763", "31.2", "0.014", "0.026", "close", "logits"]
    assert page.row("Training: memory, energy, exactness", "compile") == costs
    assert page.row("Inference: time", "compile")[1] == "130 (4.7, 10 runs)"
    stages = page.tables["Time in the step's stages, without those within them; 3 profiled steps"]
    assert stages[3] == ["backbone", "142 (4.3, 3 runs)", "35.3", "n/a"]
    assert sum(round(10 * float(row[2])) for row in stages[1:]) == 1000
    assert page.row("Host waits by operation and stage", "aten::item") == ["aten::item", "optimizer", "1"]
    operator = ["aten::convolution_backward", "53", "90.0", "n/a", "21.0"]
    assert page.row("Operators by their own time in a step", "aten::convolution_backward") == operator
    roof = ["optimizer", "0.300", "640", "25.3", "31.4", "memory", "0.808", "0.9"]
    assert page.row("Work, time and limit of each stage", "optimizer") == roof
    assert page.row("fp32: all 62", "matches") == ["matches", "match", "0", "0", "1.0e-6", "close"]
    assert page.row("Average precision: close", "bf16") == ["bf16", "0.747", "0.961"]
    assert page.row("AP by class", "star") == ["star", "n/a"]


def test_a_gpu_shows_kernels_telemetry_and_idleness(gpu: Path) -> None:
    page = Page(render_html(load_results(gpu)))
    assert page.row("Sampled beside the timed steps", "power, W") == ["power, W", "512", "564"]
    kernel = "sm90_xmma_gemm_bf16bf16_0<float, 0>"
    assert page.row("Kernels by their own time in a step", kernel) == [kernel, "12", "n/a", "3.00", "30.0"]
    said = " ".join(page.said("p"))
    for part in ("the device is idle for 4.1 % of it", "THROTTLED: power cap", "251 J", "Host waits: 0 a step"):
        assert part in said


def test_the_twin_has_the_same_tables(cpu: Path, gpu: Path) -> None:
    for folder in (cpu, gpu):
        tables = Page(render_html(load_results(folder))).tables
        assert len(tables) > 15
        assert Twin(render_markdown(load_results(folder))).tables == tables


def test_what_is_missing_says_how_to_get_it(tmp_path: Path) -> None:
    parts = {"trace": trace(), "parity": parity(), "ladder": ladder_rows()}
    for absent, places in (("ladder", ["Ladder"]), ("parity", ["Parity"]), ("trace", [*OF_THE_TRACE])):
        folder = write_results(tmp_path / absent, **{name: part for name, part in parts.items() if name != absent})
        command = f"python -m detr_profiling {absent} --out {folder}"
        assert under_headings(Page(render_html(load_results(folder))), command) == [*places, "Commands"]
        twin = Twin(render_markdown(load_results(folder)))
        assert under_headings(twin, command) == [*places, "Commands"]
        assert under_headings(twin, f"It comes from {command}") == places
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
    assert Page(render_html(load_results(tmp_path))).said("h2") == SECTIONS


def hostile(value: Any) -> Any:
    """Every text in it, and every name that the measured one chose, is one that a browser would run."""
    if isinstance(value, dict):
        chosen = ("forms", "losses", "samples", "error_histogram", "versions")
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
        *("a", "dl", "div", "dt", "dd", "table", "caption", "span", "thead", "tbody", "tr", "th", "td", "code", "i"),
        *("figure", "figcaption", "ul", "li", "details", "summary"),
        *("svg", "desc", "g", "text", "rect", "line", "path", "circle"),
    }
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")]
        assert (attributes.get("href") or "#").startswith("#")
        assert HOSTILE not in str(attributes.get("class")), tag
    assert not re.search(r"https?:|//|url\(|@import", text)
    in_pictures = " ".join(data for tags, data in page.texts if "svg" in tags)
    assert in_pictures.count(HOSTILE) > 40
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
    assert twin.tables["AP by class"][1:] == [[" ".join(name.split()), "0.500"] for name in names]
    assert {tag for tag, _ in twin.elements} == MARKDOWN_TAGS


def luminance(colour: str) -> float:
    """Relative, after WCAG 2.2."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_text_can_be_read_in_light_and_dark(cpu: Path) -> None:
    style = render_html(load_results(cpu)).partition("<style>")[2].partition("</style>")[0]
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        for name in ("ink", "quiet", "link", "good", "bad", "notable"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        for name in (*(stage.replace(" ", "-") for stage in STAGES), "other", "quiet"):
            assert f".stage-{name} {{ --hue: var(--{name}); }}" in style or name == "quiet"
            assert contrast(colours[name], colours["on-part"]) >= 4.5, name


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
    rows = twin.tables["bf16: NOT close; of each kind the nearest to its limit, and all that are past it"]
    assert ["backbone layer4", "block", "n/a", "0.024", "0.049", "NOT close"] in rows
    assert ["encoder 1", "block", "0.90", "0.037", "0.073", "NOT close"] in rows


def test_a_slower_row_stays_and_says_so(cpu: Path) -> None:
    page = Page(render_html(load_results(cpu)))
    assert page.row("Training: time", "channels-last")[1:6] == [
        "672 (12, 10 runs)",
        "1.49",
        "1.36",
        "1.00",
        "+2.5 %, within the spread",
    ]
    said = " ".join(page.said("p"))
    assert "slower than the row before: channels-last" in said
    assert "2 rounds, not in the same order in every one: bf16 and channels-last" in said
    assert ("notable", "+2.5 %, within the spread") in tones(cpu)


def tones(folder: Path) -> list[tuple[str, str]]:
    text = render_html(load_results(folder))
    return re.findall(r'<td class="\w+ (\w+)">([^<]*)</td>', text)


def test_rows_without_a_measurement(tmp_path: Path) -> None:
    rows = ladder_rows()
    place = {key: rows[0][key] for key in ("mode", "model", "size", "device")}
    rows[-1] = {"technique": "compile", "note": "not all measured: no time left", **place}
    page = Page(render_html(load_results(write_results(tmp_path, ladder=rows))))
    assert page.row("Training: time", "compile")[1:6] == ["n/a"] * 4 + ["not all measured: no time left"]
    said = " ".join(page.said("p"))
    assert "all up to folded batch norm takes 488 ms" in said and "not measured: compile" in said
    write_results(tmp_path, ladder=[{"technique": "reference", "note": "killed", **place}])
    assert "training: nothing was measured" in render_markdown(load_results(tmp_path))


def test_parts_from_two_commits_are_not_passed_off_as_one(tmp_path: Path, cpu: Path) -> None:
    changed = parity()
    changed["machine"]["commit"] = "0000000"
    folder = write_results(tmp_path / "two", trace=trace(), parity=changed)
    said = "NOT all parts were measured on one machine and commit; trace on AMD EPYC 9B14 at commit 28d3f62; parity on"
    assert said in render_markdown(load_results(folder))
    assert "NOT all parts" not in render_markdown(load_results(cpu))


def test_commands_make_the_parts_again(cpu: Path) -> None:
    rows = Page(render_html(load_results(cpu))).tables["What makes each part"][1:]
    size = "--size 320x427 --batch-size 1"
    assert [row[1] for row in rows] == [
        f"python -m detr_profiling ladder --out {cpu} {size} --threads 2",
        f"python -m detr_profiling ladder --out {cpu} --mode inference {size} --threads 2",
        f"python -m detr_profiling trace --out {cpu} {size} --device cpu --precision bf16 --compile --steps 3",
        f"python -m detr_profiling parity --out {cpu} {size} --device cpu",
        f"python -m detr_profiling report --out {cpu}",
    ]


def test_parts_that_a_trace_may_lack(tmp_path: Path) -> None:
    bare = trace() | {"memory": None, "roofline": None, "forms": {}, "host_waits": [], "host_waits_per_step": 0.0}
    text = render_markdown(load_results(write_results(tmp_path, trace=bare)))
    assert "The trace has no allocations" in text and "n/a: this trace has none" in text
    unfinished = parity() | {"variants": [], "curve": None, "ap": None, "samples": {}, "error_histogram": {}}
    text = render_markdown(load_results(write_results(tmp_path, parity=unfinished)))
    assert "parity: nothing was compared" in text


def test_a_trace_without_the_gpus_events_is_not_read_as_a_cpus(tmp_path: Path) -> None:
    host_alone = trace(gpu=True) | {"idle_share": None, "kernels": [], "roofline": None, "problem": "no events here"}
    folder = write_results(tmp_path / "lacking", trace=host_alone)
    shown = render_markdown(load_results(folder))
    assert shown.count("NOT complete: no events here") == 2, "in the summary, and beside the figures"
    assert "operators a step read on the host; other waits are not known" in shown
    assert "on a CPU nothing does" not in shown
    assert "What the GPU&#39;s allocator has handed out" in render_html(load_results(folder))
