"""SVG by hand: scales, axes and marks for pictures that stand in a page.

Horizontal places are shares of the picture's width, vertical ones pixels, so that texts keep their size on any screen.
Colours come from the page's style sheet, by class, in light and dark. Every text goes through an XML writer, which
escapes it, and the same numbers give the same bytes.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

PLOT_HEIGHT_PX = 260
INNER_WIDTH = 1000
"""Units of width in which lines are written; they stretch with the picture."""
NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where it lies: 0 at `low`, 1 at `high`."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """At most about six round numbers."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**exponent for exponent in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        return [
            each * step for each in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]


def around(values: Iterable[float], margin: float = 0.05) -> Scale:
    """A linear scale with some room on both sides of what it shows."""
    values = list(values)
    low, high = min(values), max(values)
    room = margin * (high - low or abs(high) or 1.0)
    return Scale(low - room, high + room)


class Plot:
    """A picture with two axes; points are in their units."""

    def __init__(
        self,
        name: str,
        title: str,
        description: str,
        x: Scale,
        y: Scale,
        labels: tuple[str, str],
        height_px: int = PLOT_HEIGHT_PX,
    ) -> None:
        self.x, self.y, self.height_px = x, y, height_px
        self.svg = new_svg(name, title, description, height_px, "plot")
        for tick in y.ticks():
            top = self.place(x.low, tick)[1]
            rule(self.svg, (0, top), (1, top), "grid")
            write(self.svg, 0, top + 4, tick_text(tick, y), "tick", "end", shift_px=-8)
        for tick in x.ticks():
            left = self.place(tick, y.low)[0]
            rule(self.svg, (left, height_px), (left, height_px + 5), "grid")
            write(self.svg, left, height_px + 19, tick_text(tick, x), "tick", "middle")
        rule(self.svg, (0, height_px), (1, height_px), "axis")
        write(self.svg, 1, height_px + 36, labels[0], "label", "end")
        write(self.svg, 0, -15, labels[1], "label", "end", shift_px=-8)
        size = {"width": "100%", "height": str(height_px), "viewBox": f"0 0 {INNER_WIDTH} {height_px}"}
        self.stretched = SubElement(self.svg, "svg", {**size, "preserveAspectRatio": "none"})

    def place(self, x: float, y: float) -> Point:
        """Share of the width, and pixels from the top."""
        return self.x.share(x), self.height_px * (1 - self.y.share(y))

    def _written(self, points: Sequence[Point]) -> list[str]:
        places = (self.place(x, y) for x, y in points)
        return [f"{INNER_WIDTH * left:.1f} {top:.1f}" for left, top in places]

    def line(self, points: Sequence[Point], style: str) -> None:
        SubElement(self.stretched, "path", {"class": f"line {style}", "d": "M" + "L".join(self._written(points))})

    def area(self, points: Sequence[Point], style: str) -> None:
        """Between the points and the horizontal axis."""
        outline = [(points[0][0], self.y.low), *points, (points[-1][0], self.y.low)]
        SubElement(self.stretched, "path", {"class": f"area {style}", "d": "M" + "L".join(self._written(outline))})

    def cloud(self, points: Sequence[Point], style: str) -> None:
        """A small dot each: lines without length, with round ends."""
        SubElement(
            self.stretched,
            "path",
            {"class": f"cloud {style}", "d": "".join(f"M{place}h0" for place in self._written(points))},
        )

    def dot(self, point: Point, style: str, said: str, radius_px: int = 5) -> None:
        left, top = self.place(*point)
        circle = {"cx": share(left), "cy": f"{top:.1f}", "r": str(radius_px), "class": style}
        hint(SubElement(self.svg, "circle", circle), said)

    def note(self, point: Point, text: str, style: str, anchor: str, down_px: float) -> None:
        """Text beside a point."""
        left, top = self.place(*point)
        write(self.svg, left, top + down_px, text, style, anchor)

    def __str__(self) -> str:
        return text_of(self.svg)


def new_svg(name: str, title: str, description: str, height_px: int, style: str) -> Element:
    """`name` is unique in the page: title and description are found by it."""
    identity = {"role": "img", "aria-labelledby": f"{name}-title {name}-description"}
    svg = Element("svg", {"class": style, "width": "100%", "height": str(height_px), **identity})
    SubElement(svg, "title", {"id": f"{name}-title"}).text = writable(title)
    SubElement(svg, "desc", {"id": f"{name}-description"}).text = writable(description)
    return svg


def write(
    parent: Element, left: float, top_px: float, text: str, style: str, anchor: str = "start", shift_px: int = 0
) -> None:
    place = {"x": share(left), "y": f"{top_px:.1f}", "class": style}
    if anchor != "start":
        place["text-anchor"] = anchor
    if shift_px:
        place["dx"] = str(shift_px)
    SubElement(parent, "text", place).text = writable(text)


def box(parent: Element, left: float, width: float, top_px: float, height_px: float, style: str) -> None:
    place = {"x": share(left), "width": share(width), "y": f"{top_px:.1f}", "height": f"{height_px:.1f}"}
    SubElement(parent, "rect", {**place, "class": style})


def rule(parent: Element, start: Point, end: Point, style: str) -> None:
    """A straight line; both ends as a share of the width and pixels from the top."""
    ends = {"x1": share(start[0]), "y1": f"{start[1]:.1f}", "x2": share(end[0]), "y2": f"{end[1]:.1f}"}
    SubElement(parent, "line", {**ends, "class": style})


def hint(parent: Element, text: str) -> None:
    """Shown where the pointer rests."""
    SubElement(parent, "title").text = writable(text)


def share(part: float) -> str:
    return f"{100 * part:.2f}%"


def tick_text(value: float, scale: Scale) -> str:
    if not scale.log:
        return f"{value:,.10g}" if value else "0"
    return f"{value:,.10g}" if 1e-3 <= value < 1e5 else f"1e{round(math.log10(value))}"


def writable(text: str) -> str:
    """Without the characters that no XML may have."""
    return NOT_IN_XML.sub("\ufffd", text)


def text_of(svg: Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")


def shorten(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"
