"""Charts: what is drawn where, that every text is a text, and inputs at the edge of what is possible."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest
from detr_profiling.pages import charts
from detr_profiling.pages.charts import Bar, Dot, svg_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HOSTILE = "<script>$\\alpha$</script>&"
BARS = [Bar("reference", 900, 890, 910), Bar("slower", 990, 980, 1000), Bar("faster", 450, 440, 455)]
CURVE = [(0.0, 100.0), (10.0, 400.0), (20.0, 50.0)]
TOTAL, RANGES = Dot("all", 10, 0.1), [Dot("backbone", 100, 0.5), Dot("encoder", 30, 0.3)]
LOSSES: dict[str, list[float | None]] = {"reference": [4.0, 3.0, None, 1.0], "fp32": [4.0, 3.1, float("nan"), 1.1]}
CHARTS: dict[str, Callable[[str], Figure]] = {
    "ladder": lambda text: charts.ladder_bars([Bar(text, 3, 2, 4), *BARS]),
    "baselines": lambda text: charts.baseline_bars([Bar(text, 3, 2, 4), *BARS]),
    "ranges": lambda text: charts.range_bars([Bar(text, 3, 2, 4), *BARS]),
    "ranges of a GPU": lambda text: charts.range_bars([Bar(text, 3, 2, 4, 5), *BARS]),
    "memory": lambda text: charts.memory_curve(CURVE, text),
    "roofline": lambda text: charts.roofline(20, 1.3, TOTAL, [Dot(text, 5, 0.1), *RANGES]),
    "outputs": lambda text: charts.outputs([(0.0, 0.1), (2.0, 1.9)], [-9, -8, -7], [3, 5]),
    "losses": lambda text: charts.loss_curves({text: [2.0, 1.0], **LOSSES}),
}
COLOURS = (charts.BLUE, charts.SKY, charts.VERMILION, charts.GREEN, charts.PURPLE, charts.ORANGE)


def axes_of(figure: Figure) -> Axes:
    return figure.axes[0]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("kind", CHARTS)
def test_texts_are_texts_and_nothing_else(kind: str) -> None:
    svg = svg_of(lambda: CHARTS[kind](HOSTILE))
    root = ElementTree.fromstring(svg)
    said = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(HOSTILE in text for text in said) or kind == "outputs"
    assert not any("mathdefault" in text for text in said), "ticks are numbers, not formulas"
    assert "<script" not in svg and not re.search(r' on\w+="|href="(?!#|data:image/png)', svg)
    assert "dc:date" not in svg, "the same numbers on another day are the same bytes"


@pytest.mark.parametrize("kind", CHARTS)
def test_same_numbers_give_the_same_bytes(kind: str) -> None:
    assert svg_of(lambda: CHARTS[kind]("name")) == svg_of(lambda: CHARTS[kind]("name"))


def test_characters_that_xml_has_not() -> None:
    svg = svg_of(lambda: CHARTS["ladder"]("a\x00b\x1b\ud800"))
    assert r"a\x00b\x1b\ud800" in svg
    ElementTree.fromstring(svg.encode())


def bars_of(axes: Axes) -> dict[str, list[tuple[int, float]]]:
    """By what the legend calls them, rows and lengths of bars."""
    return {
        str(container.get_label()): [(round(bar.get_y() + bar.get_height() / 2), bar.get_width()) for bar in container]
        for container in axes.containers
        if hasattr(container, "patches")
    }


def test_ladder_is_to_scale_and_shows_what_is_slower() -> None:
    axes = axes_of(charts.ladder_bars(BARS))
    assert bars_of(axes) == {
        "saved against the row above": [(0, 900), (1, 900), (2, 990)],
        "median and quartiles": [(0, 900), (2, 450)],
        "slower than the row above": [(1, 990)],
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["reference", "slower", "faster"]
    assert texts(axes) == ["900 ms", "990 ms, +10 %", "450 ms, −55 %"]
    hatched = [
        bar.get_hatch() is not None for container in axes.containers for bar in getattr(container, "patches", ())
    ]
    assert hatched == [False] * 5 + [True], "it is not told by colour alone"


def test_quartiles_are_shown() -> None:
    axes = axes_of(charts.ladder_bars(BARS))
    ends = {tuple(x for x, _ in segment) for bars in axes.collections for segment in bars.get_segments()}  # type: ignore[attr-defined]
    assert ends == {(890, 910), (980, 1000), (440, 455)}


def test_baselines_are_compared_with_the_first() -> None:
    axes = axes_of(charts.baseline_bars(BARS))
    assert bars_of(axes) == {"baseline, median and quartiles": [(0, 900), (1, 990)], "faster": [(2, 450)]}
    assert texts(axes) == ["900 ms", "990 ms, +10 %", "450 ms, −50 %"]


def test_ranges_show_host_and_device() -> None:
    ranges = [Bar("backbone", 140, 135, 150, 160), Bar("matching", 2, 1, 3, None)]
    axes = axes_of(charts.range_bars(ranges))
    lengths = {name: [length for _, length in bars] for name, bars in bars_of(axes).items()}
    assert lengths == {"host, median and quartiles": [140, 2], "device": [160, 0]}
    assert "device" not in bars_of(axes_of(charts.range_bars(BARS)))


@pytest.mark.parametrize(("at", "side"), [(0, "left"), (50, "center"), (100, "right")])
def test_memory_stays_until_the_next_event_and_its_peak_is_marked(at: float, side: str) -> None:
    curve = [(float(ms), 900.0 if ms == at else 100.0) for ms in (0, 50, 100)]
    axes = axes_of(charts.memory_curve(curve, "peak 900 MiB"))
    steps, peak = axes.lines
    assert steps.get_drawstyle() == "steps-post"
    assert (list(peak.get_xdata()), list(peak.get_ydata())) == ([at], [900.0])
    assert texts(axes) == ["peak 900 MiB"]
    assert axes.texts[0].get_horizontalalignment() == side, "at an edge it keeps within"


def test_roofline_breaks_where_memory_and_arithmetic_meet() -> None:
    axes = axes_of(charts.roofline(20, 2, TOTAL, RANGES))
    ceiling, *dots = axes.lines
    (low, ridge, _), heights = np.array(ceiling.get_xdata()), np.array(ceiling.get_ydata())
    assert ridge == 100, "FLOP/byte, at which 20 GB/s are 2 TFLOP/s"
    assert heights == pytest.approx([20 * low / 1e3, 2, 2])
    assert [(each.get_xdata()[0], each.get_ydata()[0]) for each in dots] == [(10, 0.1), (100, 0.5), (30, 0.3)]  # type: ignore[index]
    assert texts(axes)[2:] == ["Σ", "1", "2"]
    assert [str(each.get_label())[:11] for each in dots] == ["Σ  all, 0.1", "1  backbone", "2  encoder,"]


def test_outputs_beside_the_references_and_their_errors() -> None:
    left, right = charts.outputs([(0.0, 1.0), (1.0, 0.0)], [-9, -8, -6], [10, 5]).axes
    equal, points = left.lines
    assert list(equal.get_xdata()) == list(equal.get_ydata()) == [0, 1]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([0, 1], [1, 0])
    values, edges, _ = right.patches[0].get_data()  # type: ignore[attr-defined]
    assert list(values) == [10, 5] and list(edges) == pytest.approx([1e-9, 1e-8, 1e-6])


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    first, second = axes_of(charts.loss_curves(LOSSES)).lines
    for line in (first, second):
        assert list(np.isnan(np.array(line.get_ydata(), dtype=float))) == [False, False, True, False]
        assert line.get_marker() == "." and list(np.array(line.get_markevery())) == [False, False, False, True]
    assert first.get_linewidth() > 3 * second.get_linewidth() and first.get_color() != second.get_color()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: charts.ladder_bars([Bar("alone", 1e-6, 1e-6, 1e-6)]),
        lambda: charts.baseline_bars([Bar("odd", 5, 6, 4)]),
        lambda: charts.range_bars([Bar("nothing", 0.0, 0.0, 0.0)]),
        lambda: charts.range_bars([Bar("less than nothing", -0.01, -0.02, 0.0)]),
        lambda: charts.memory_curve([(5.0, 100.0)], "peak"),
        lambda: charts.memory_curve([(5.0, 0.0), (6.0, 0.0)], "peak"),
        lambda: charts.roofline(20, 2, None, []),
        lambda: charts.outputs([(2.0, 2.0)], [], []),
        lambda: charts.outputs([], [-3, -2.9], [0]),
        lambda: charts.loss_curves({"none": [None, None]}),
        lambda: charts.loss_curves({"constant": [3.0]}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_least_there_can_be(draw: Callable[[], Figure]) -> None:
    assert not re.search(r'="[^"]*\b(nan|inf)\b', svg_of(draw))


def luminance(colour: str) -> float:
    """Relative, after WCAG 2.2."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_letters_can_be_read() -> None:
    for colour in (charts.INK, charts.QUIET):
        assert contrast(colour, "#ffffff") >= 4.5
    for colour in (charts.BLUE, charts.VERMILION):  # behind the roofline's large marks
        assert contrast("#ffffff", colour) >= 3
    assert len(set(COLOURS)) == 6
