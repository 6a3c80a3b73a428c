"""Pictures: what is drawn where, that every text is a text, and inputs at the edge of what is possible."""

import math
import re
from collections.abc import Callable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from detr_profiling.pages import charts
from detr_profiling.pages.drawing import Scale, around

HOSTILE = '<script>alert(1)</script>"&'
BARS = [
    charts.Bar("reference", 900, 890, 910),
    charts.Bar("slower", 990, 980, 1000),
    charts.Bar("faster", 450, 440, 455),
]
PARTS = [("backbone", 0.5, "stage-backbone"), ("loss", 0.02, "stage-loss"), ("backward", 0.48, "stage-backward")]
CURVE = [(0.0, 100.0), (10.0, 400.0), (20.0, 50.0)]
DOTS = [charts.Dot("backbone", "1", 100, 0.5, "stage-backbone"), charts.Dot("all", "Σ", 10, 0.1, "stage-other")]
LOSSES = {"reference": [4.0, 3.0, None, 1.0], "fp32": [4.0, 3.1, float("nan"), 1.1]}
HUES = ("series-0", "series-1")

PICTURES: dict[str, Callable[[str, str], str]] = {
    "waterfall": lambda name, text: charts.waterfall(name, text, [charts.Bar(text, 3, 2, 4), *BARS]),
    "stacked bar": lambda name, text: charts.stacked_bar(name, text, [(text, 0.2, "stage-other"), *PARTS]),
    "memory": lambda name, text: charts.memory_curve(name, text, CURVE, (text, text)),
    "roofline": lambda name, text: charts.roofline(name, text, 20, 1.3, [charts.Dot(text, "1", 5, 0.1, "x"), *DOTS]),
    "scatter": lambda name, text: charts.scatter(name, text, [(0.0, 0.1), (2.0, 1.9)]),
    "histogram": lambda name, text: charts.histogram(name, text, [-9, -8, -7], [3, 5]),
    "losses": lambda name, text: charts.loss_curves(name, text, {text: [2.0, 1.0]}, HUES),
}


def drawn(svg: str) -> Element:
    return ElementTree.fromstring(svg)


def styled(svg: str, tag: str, style: str) -> list[Element]:
    return [each for each in drawn(svg).iter(tag) if style in (each.get("class") or "").split()]


def percent(element: Element, name: str) -> float:
    return float(element.attrib[name].removesuffix("%"))


def path_points(element: Element) -> list[tuple[float, float]]:
    """In thousandths of the width and pixels from the top."""
    numbers = [float(each) for each in re.findall(r"-?[\d.]+", element.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@pytest.mark.parametrize("kind", PICTURES)
def test_texts_are_texts_and_pictures_have_titles(kind: str) -> None:
    svg = PICTURES[kind]("name", HOSTILE)
    assert "<script" not in svg
    root = drawn(svg)
    assert root.get("role") == "img" and root.get("aria-labelledby") == "name-title name-description"
    assert [root[0].tag, root[0].get("id"), root[0].text] == ["title", "name-title", HOSTILE]
    assert [root[1].tag, root[1].get("id")] == ["desc", "name-description"] and root[1].text
    allowed = {"svg", "title", "desc", "g", "text", "rect", "line", "path", "circle"}
    assert {each.tag for each in root.iter()} <= allowed
    assert not [name for each in root.iter() for name in each.attrib if name.startswith("on") or "href" in name]
    assert not re.search("nan|inf", "".join(value for each in root.iter() for value in each.attrib.values()))


@pytest.mark.parametrize("kind", PICTURES)
def test_same_numbers_give_the_same_bytes(kind: str) -> None:
    assert PICTURES[kind]("name", "title") == PICTURES[kind]("name", "title")


def test_characters_that_xml_has_not() -> None:
    svg = PICTURES["stacked bar"]("name", "a\x00b\x1b\ud800")
    assert drawn(svg)[0].text == "a�b��"
    svg.encode("utf-8")


def test_waterfall_is_to_scale_and_shows_what_is_slower() -> None:
    svg = charts.waterfall("name", "title", BARS)
    times, saved, cost = (styled(svg, "rect", style) for style in ("time", "saved", "cost"))
    assert [percent(each, "width") for each in times] == [90.0, 90.0, 45.0], "of the longest third quartile, 1000 ms"
    assert [percent(each, "width") for each in cost] == [99.0]
    assert [percent(each, "width") for each in saved] == [90.0, 99.0]
    spreads = [(percent(each, "x1"), percent(each, "x2")) for each in styled(svg, "line", "spread")]
    assert spreads == [(89.0, 91.0), (98.0, 100.0), (44.0, 45.5)]
    assert [each.text for each in styled(svg, "text", "label")] == ["+10 %", "−55 %"]
    assert [each.text for each in styled(svg, "text", "value")] == ["900 ms", "990 ms", "450 ms"]


def test_stacked_bar_is_the_whole() -> None:
    svg = charts.stacked_bar("name", "title", PARTS)
    boxes = styled(svg, "rect", "part")
    assert [percent(each, "x") for each in boxes] == [0, 50, 52]
    assert sum(percent(each, "width") for each in boxes) == pytest.approx(100)
    assert [each.text for each in styled(svg, "text", "on-part")] == ["50 %", "48 %"], "2 % is too narrow for a text"
    assert "loss: 2.0 %" in [each.text for each in drawn(svg).iter("title")]


def test_memory_stays_until_the_next_event_and_its_peak_is_marked() -> None:
    svg = charts.memory_curve("name", "title", CURVE, ("peak 400 MiB", "backward"))
    line = path_points(styled(svg, "path", "line")[0])
    assert [left for left, _ in line] == [0, 500, 500, 1000, 1000]
    assert line[0][1] == line[1][1] and line[2][1] == line[3][1]
    (peak,) = styled(svg, "circle", "peak")
    assert percent(peak, "cx") == 50 and float(peak.attrib["cy"]) == line[2][1] == min(top for _, top in line)
    assert [each.text for each in styled(svg, "text", "note")] == ["peak 400 MiB", "backward"]


@pytest.mark.parametrize(("at", "anchor"), [(0, None), (50, "middle"), (100, "end")])
def test_peak_at_an_edge_keeps_its_text_within(at: float, anchor: str | None) -> None:
    curve = [(float(ms), 900.0 if ms == at else 100.0) for ms in (0, 50, 100)]
    notes = styled(charts.memory_curve("name", "title", curve, ("peak", "place")), "text", "note")
    assert [each.get("text-anchor") for each in notes] == [anchor, anchor]


def test_roofline_breaks_where_memory_and_arithmetic_meet() -> None:
    svg = charts.roofline("name", "title", copy_gb_s=20, product_tflop_s=2, dots=DOTS)
    low, ridge, end = path_points(styled(svg, "path", "ceiling")[0])
    assert low[1] > ridge[1] == end[1] and end[0] == 1000
    first, total = styled(svg, "circle", "part")
    assert 10 * percent(first, "cx") == pytest.approx(ridge[0], abs=0.2), "100 FLOP/byte is 2 TFLOP/s at 20 GB/s"
    px_per_decade = (float(total.attrib["cy"]) - float(first.attrib["cy"])) / math.log10(0.5 / 0.1)
    assert float(first.attrib["cy"]) - ridge[1] == pytest.approx(math.log10(2 / 0.5) * px_per_decade, abs=0.3)
    part_of_slope = (10 * percent(total, "cx") - low[0]) / (ridge[0] - low[0])
    allowed_px = low[1] + part_of_slope * (ridge[1] - low[1])
    assert float(total.attrib["cy"]) - allowed_px == pytest.approx(math.log10(0.2 / 0.1) * px_per_decade, abs=0.3)


def test_roofline_without_stages_shows_the_limits() -> None:
    svg = charts.roofline("name", "title", 20, 2, [])
    assert styled(svg, "path", "ceiling") and not styled(svg, "circle", "part")


def test_scatter_has_equal_axes() -> None:
    svg = charts.scatter("name", "title", [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
    assert path_points(styled(svg, "path", "equal")[0]) == [(0, charts.PANEL_HEIGHT_PX), (1000, 0)]
    cloud = styled(svg, "path", "cloud")[0].attrib["d"]
    assert cloud.count("M") == 3 and cloud.count("h0") == 3
    assert f"M500.0 {charts.PANEL_HEIGHT_PX / 2:.1f}h0" in cloud


def test_histogram_is_as_high_as_its_counts() -> None:
    svg = charts.histogram("name", "title", [-9, -8, -6], [10, 5])
    outline = path_points(styled(svg, "path", "area")[0])
    assert [left for left, _ in outline] == [0, 0, 333.3, 333.3, 1000, 1000]
    height = charts.PANEL_HEIGHT_PX
    assert outline[0][1] == outline[-1][1] == height
    assert (height - outline[1][1]) / (height - outline[3][1]) == pytest.approx(2, rel=1e-2)
    assert [each.text for each in styled(svg, "text", "tick") if "e-" in str(each.text)] == [
        "1e-9",
        "1e-8",
        "1e-7",
        "1e-6",
    ]


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    svg = charts.loss_curves("name", "title", LOSSES, HUES)
    lines = styled(svg, "path", "loss")
    assert [len(path_points(each)) for each in lines] == [2, 1, 2, 1]
    assert [("series-0" in each.attrib["class"], "beneath" in each.attrib["class"]) for each in lines] == [
        (True, True),
        (True, True),
        (False, False),
        (False, False),
    ]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: charts.waterfall("name", "title", [charts.Bar("alone", 1e-6, 1e-6, 1e-6)]),
        lambda: charts.stacked_bar("name", "title", [("nothing", 0.0, "x")]),
        lambda: charts.stacked_bar("name", "title", [("less than nothing", -0.01, "x"), ("rest", 1.01, "y")]),
        lambda: charts.memory_curve("name", "title", [(5.0, 100.0)], ("peak", "place")),
        lambda: charts.memory_curve("name", "title", [(5.0, 0.0), (6.0, 0.0)], ("peak", "place")),
        lambda: charts.scatter("name", "title", [(2.0, 2.0)]),
        lambda: charts.scatter("name", "title", [(0.0, 0.0)]),
        lambda: charts.histogram("name", "title", [-3, -2.9], [0]),
        lambda: charts.loss_curves("name", "title", {"none": [None, None]}, HUES),
        lambda: charts.loss_curves("name", "title", {"constant": [3.0]}, HUES),
    ],
)
def test_the_least_there_can_be(draw: Callable[[], str]) -> None:
    root = drawn(draw())
    assert not re.search("nan|inf", "".join(value for each in root.iter() for value in each.attrib.values()))


def test_ticks_are_round_and_within() -> None:
    assert Scale(0, 1187).ticks() == [0, 500, 1000]
    assert Scale(-0.7, 0.72).ticks() == pytest.approx([-0.5, 0, 0.5])
    assert Scale(2, 3000, log=True).ticks() == [10, 100, 1000]
    assert Scale(1e-12, 1, log=True).ticks() == pytest.approx([1e-12, 1e-9, 1e-6, 1e-3, 1])
    for low, high in ((0, 1e-7), (3, 3.0001), (-8e6, 9e6), (0, 5.9)):
        ticks = Scale(low, high).ticks()
        assert 2 <= len(ticks) <= 6 and low <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)


def test_room_around_what_does_not_vary() -> None:
    for values in ([0.0], [5.0, 5.0], [-3.0]):
        scale = around(values)
        assert scale.low < values[0] < scale.high
        assert scale.share(values[0]) == pytest.approx(0.5)
