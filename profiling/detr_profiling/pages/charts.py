"""The report's pictures, each as inline SVG from plain numbers."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple
from xml.etree.ElementTree import SubElement

import numpy as np

from detr_profiling.pages.drawing import Plot, Point, Scale, around, box, hint, new_svg, rule, shorten, text_of, write
from detr_profiling.pages.formats import number, percent, signed_percent

ROW_HEIGHT_PX = 46
STACK_HEIGHT_PX = 48
CHANGE_FROM_RIGHT_PX = 84
PANEL_HEIGHT_PX = 180
SUM = "Σ"
"""The mark of all stages together: a larger dot beneath theirs."""
LEAST_LABELLED = 0.075
"""Of the width: in a narrower part its share does not fit."""


class Bar(NamedTuple):
    """A row of the waterfall."""

    name: str
    median_ms: float
    q1_ms: float
    q3_ms: float


def waterfall(name: str, title: str, bars: Sequence[Bar]) -> str:
    """Each row's time, and what it saves or costs against the row before."""
    longest = max(max(bar.q3_ms, bar.median_ms) for bar in bars)
    said = "; ".join(f"{bar.name} {number(bar.median_ms)} ms" for bar in bars)
    svg = new_svg(name, title, said, ROW_HEIGHT_PX * len(bars), "bars")
    for index, bar in enumerate(bars):
        top, before_ms = index * ROW_HEIGHT_PX, bars[max(0, index - 1)].median_ms
        group = SubElement(svg, "g")
        hint(group, f"{bar.name}: {number(bar.median_ms)} ms, {number(before_ms / bar.median_ms)} times the row before")
        write(group, 0, top + 15, shorten(bar.name), "name")
        write(group, 1, top + 15, f"{number(bar.median_ms)} ms", "value", "end")
        if index:
            change = signed_percent(bar.median_ms / before_ms - 1)
            write(group, 1, top + 15, change, "label", "end", shift_px=-CHANGE_FROM_RIGHT_PX)
        low, high = sorted((bar.median_ms, before_ms))
        box(group, 0, high / longest, top + 22, 12, "cost" if bar.median_ms > before_ms else "saved")
        box(group, 0, low / longest, top + 22, 12, "time")
        rule(group, (bar.q1_ms / longest, top + 28), (bar.q3_ms / longest, top + 28), "spread")
    return text_of(svg)


def stacked_bar(name: str, title: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar of all parts; each a name, its share of the whole and its hue."""
    total = sum(max(0.0, share) for _, share, _ in parts) or 1.0
    said = ", ".join(f"{part} {percent(share)} %" for part, share, _ in parts)
    svg = new_svg(name, title, said, STACK_HEIGHT_PX, "bars")
    left = 0.0
    for part, share, hue in parts:
        width = max(0.0, share) / total
        group = SubElement(svg, "g")
        hint(group, f"{part}: {percent(share)} %")
        box(group, left, width, 0, STACK_HEIGHT_PX, f"part {hue}")
        if width >= LEAST_LABELLED:
            write(group, left + width / 2, STACK_HEIGHT_PX / 2 + 5, f"{100 * width:.0f} %", "on-part", "middle")
        left += width
    return text_of(svg)


def memory_curve(name: str, title: str, curve: Sequence[Point], peak: tuple[str, str]) -> str:
    """MiB over milliseconds; `peak`, how much and where, is written at the highest point."""
    times_ms, highest = [ms for ms, _ in curve], max(curve, key=lambda point: point[1])
    x = Scale(min(times_ms), max(times_ms)) if len(set(times_ms)) > 1 else around(times_ms)
    y = Scale(0, 1.25 * highest[1] or 1.0)
    plot = Plot(name, title, ", ".join(peak), x, y, ("ms since the first recorded step began", "MiB"))
    steps = staircase(curve)
    plot.area(steps, "memory")
    plot.line(steps, "memory")
    plot.dot(highest, "peak", ", ".join(peak))
    place = x.share(highest[0])
    anchor = "start" if place < 0.2 else "end" if place > 0.8 else "middle"
    plot.note(highest, peak[0], "note strong", anchor, down_px=-28)
    plot.note(highest, shorten(peak[1], 44), "note", anchor, down_px=-12)
    return str(plot)


def staircase(curve: Sequence[Point]) -> list[Point]:
    """What is allocated stays so until the next event."""
    points = list(curve[:1])
    for (_, before_mib), (ms, mib) in pairwise(curve):
        points += [(ms, before_mib), (ms, mib)]
    return points


class Dot(NamedTuple):
    """A point of the roofline; both coordinates above 0."""

    name: str
    mark: str
    """Two characters at most, shown on it."""
    flop_per_byte: float
    tflop_s: float
    hue: str


def roofline(name: str, title: str, copy_gb_s: float, product_tflop_s: float, dots: Sequence[Dot]) -> str:
    """What each stage reaches, under what the measured copy and the measured product allow."""
    ridge = 1e3 * product_tflop_s / copy_gb_s
    along = [ridge / 10, ridge * 10, *(dot.flop_per_byte * factor for dot in dots for factor in (0.5, 2))]
    x = Scale(min(along), max(along), log=True)
    y = Scale(min([copy_gb_s * x.low / 1e3, *(dot.tflop_s for dot in dots)]) / 2, product_tflop_s * 4, log=True)
    said = [f"{each.name}: {number(each.flop_per_byte)} FLOP/byte, {number(each.tflop_s)} TFLOP/s" for each in dots]
    plot = Plot(name, title, "; ".join(said), x, y, ("FLOP per byte moved at least", "TFLOP/s"), 300)
    start = max(x.low, 1e3 * y.low / copy_gb_s)
    corner, far = (ridge, product_tflop_s), (x.high, product_tflop_s)
    plot.line([(start, copy_gb_s * start / 1e3), corner, far], "ceiling")
    plot.note(far, f"measured product {number(product_tflop_s)} TFLOP/s", "note", "end", down_px=-9)
    below = (start * (ridge / start) ** 0.1, copy_gb_s * start * (ridge / start) ** 0.1 / 1e3)
    plot.note(below, f"measured copy {number(copy_gb_s)} GB/s", "note", "start", down_px=18)
    for dot, words in zip(dots, said, strict=True):
        place = (dot.flop_per_byte, dot.tflop_s)
        plot.dot(place, f"part {dot.hue}", words, radius_px=12 if dot.mark == SUM else 9)
        plot.note(place, dot.mark, "on-part", "middle", down_px=4)
    return str(plot)


def scatter(name: str, title: str, pairs: Sequence[Point]) -> str:
    """Ours over the oracle's, and the diagonal on which they are equal."""
    scale = around([value for pair in pairs for value in pair])
    plot = Plot(name, title, f"{len(pairs)} values", scale, scale, ("in float64", "here"), PANEL_HEIGHT_PX)
    plot.line([(scale.low, scale.low), (scale.high, scale.high)], "equal")
    plot.cloud(pairs, "values")
    return str(plot)


def histogram(name: str, title: str, edges_log10: Sequence[float], counts: Sequence[float]) -> str:
    """How many entries err by how much: decades along, counts up."""
    x = Scale(10.0 ** edges_log10[0], 10.0 ** edges_log10[-1], log=True)
    y = Scale(0, 1.1 * max(counts) or 1.0)
    plot = Plot(name, title, f"{number(sum(counts))} entries", x, y, ("absolute error", "entries"), PANEL_HEIGHT_PX)
    outline = [(10.0**edge, height) for i, height in enumerate(counts) for edge in edges_log10[i : i + 2]]
    plot.area(outline, "values")
    return str(plot)


def loss_curves(name: str, title: str, losses: Mapping[str, Sequence[float | None]], hues: Sequence[str]) -> str:
    """Loss over steps, a curve each, the first one broad beneath the others. A loss that is not finite leaves a gap."""
    known = [value for curve in losses.values() for value in finite_values(curve)]
    steps = max(len(curve) for curve in losses.values())
    y = around(known, margin=0.1) if known else Scale(0, 1)
    x = Scale(1, max(2, steps))
    plot = Plot(name, title, f"{steps} steps of {', '.join(losses)}", x, y, ("step", "loss"), 220)
    for index, ((_, curve), hue) in enumerate(zip(losses.items(), hues, strict=False)):
        for stretch in stretches(curve):
            plot.line(stretch, f"loss {hue}{' beneath' if index == 0 else ''}")
    return str(plot)


def finite_values(curve: Sequence[float | None]) -> list[float]:
    return [value for value in curve if value is not None and np.isfinite(value)]


def stretches(curve: Sequence[float | None]) -> list[list[Point]]:
    """(step, loss) from 1 on, parted where there is no finite loss."""
    parts: list[list[Point]] = [[]]
    for step, value in enumerate(curve, start=1):
        if value is None or not np.isfinite(value):
            parts.append([])
        else:
            parts[-1].append((float(step), value))
    return [part for part in parts if part]
