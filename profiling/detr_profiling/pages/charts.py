"""The report's charts, drawn by matplotlib from plain numbers: each function returns a figure.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which colour-blind people tell apart. Texts stay
texts in the SVG, and the same numbers give the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from detr_fast.evaluation.fonts import FONTS, one_line
from detr_profiling.pages.formats import number, signed_percent

BLUE, SKY, VERMILION, GREEN, PURPLE, ORANGE = "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#aa4499", "#e69f00"
INK, QUIET, HAIR, PALE = "#21201c", "#66635b", "#e2dfd6", "#cfe3ef"
STYLE: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "detr_profiling", "text.parse_math": False, "axes.unicode_minus": True},
    **{
        "figure.dpi": 72,
        "font.sans-serif": ["DejaVu Sans", "Verdana"],
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "text.color": INK,
    },
    **{"axes.labelcolor": QUIET, "axes.edgecolor": QUIET, "axes.linewidth": 0.8, "axes.titlesize": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.formatter.limits": (-4, 6)},
    **{"grid.color": HAIR, "xtick.color": QUIET, "ytick.color": QUIET, "legend.frameon": False, "legend.fontsize": 8},
}
WIDTH_INCHES = 9.2
"""So that letters of 9 points are of 12 pixels on a page of 900."""
LONGEST_NAME = 34
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
Point = tuple[float, float]


def svg_of(draw: Callable[[], Figure]) -> str:
    """Return a figure as SVG: no date in it, no letters as outlines, `$` and `<` in names as they are."""
    with rc_context(STYLE):
        figure = draw()
        FONTS.prepare(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", dpi=144, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()


def axes_of(height_inches: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a name in one line that is not too long, of letters that fonts here have."""
    name = FONTS.shown(one_line(name))
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def note(axes: Axes, text: str, xy: Point, points_away: Point, **alignment: Any) -> None:
    """Write a text at `xy` in the axes' units, some points away from it."""
    axes.annotate(text, xy, points_away, textcoords="offset points", **alignment)


def log_ticks(*axes: Axis) -> None:
    """Label powers of ten without the formulas that matplotlib would write, which stay unread here."""
    for each in axes:
        each.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.10g}" if 1e-3 <= value < 1e5 else f"{value:g}")
        )
        each.set_minor_locator(NullLocator())


class Bar(NamedTuple):
    """Holds a median with its quartiles, in milliseconds; of a profiler range also the device's time."""

    name: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    device_ms: float | None = None


def horizontal_bars(axes: Axes, names: Sequence[str], label: str) -> None:
    """Set one row a name, the first at the top, over an axis of `label`."""
    axes.set_yticks(range(len(names)), [shorten(name) for name in names], color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel(label)


def error_bars(bars: Sequence[Bar]) -> dict[str, Any]:
    """Return what `barh` takes to show the quartiles."""
    below = [max(0.0, bar.median_ms - bar.q1_ms) for bar in bars]
    above = [max(0.0, bar.q3_ms - bar.median_ms) for bar in bars]
    return {"xerr": [below, above], "error_kw": {"ecolor": INK, "elinewidth": 1.2, "capsize": 3}}


def ladder_bars(bars: Sequence[Bar]) -> Figure:
    """Draw each row's time, and what it saves or costs against the row above it."""
    figure, (axes,) = axes_of(0.34 * len(bars) + 0.9)
    before = [bars[max(0, row - 1)].median_ms for row in range(len(bars))]
    slower = [row for row, bar in enumerate(bars) if bar.median_ms > before[row]]
    others = [row for row in range(len(bars)) if row not in slower]
    if any(bar.median_ms < other for bar, other in zip(bars, before, strict=True)):
        axes.barh(range(len(bars)), before, 0.62, color=PALE, label="saved against the row above")
    add_bars(axes, bars, others, color=BLUE, label="median and quartiles")
    # the hatch tells it without colour
    add_bars(axes, bars, slower, color=VERMILION, hatch="////", label="slower than the row above")
    label_bars(axes, bars, before, [max(ends) for ends in zip(before, ends_of(bars), strict=True)])
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def baseline_bars(bars: Sequence[Bar]) -> Figure:
    """Draw each baseline's time and, as the last, ours, with the difference from the first."""
    figure, (axes,) = axes_of(0.34 * len(bars) + 0.9)
    *baselines, ours = range(len(bars))
    add_bars(axes, bars, baselines, color=SKY, label="baseline, median and quartiles")
    add_bars(axes, bars, [ours], color=BLUE, label=shorten(bars[ours].name))
    label_bars(axes, bars, [bars[0].median_ms] * len(bars), ends_of(bars))
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def ends_of(bars: Sequence[Bar]) -> list[float]:
    return [max(bar.median_ms, bar.q3_ms) for bar in bars]


def add_bars(axes: Axes, bars: Sequence[Bar], rows: Sequence[int], **style: Any) -> None:
    """Draw the bars of some rows in one style, with their quartiles."""
    if rows:
        chosen = [bars[row] for row in rows]
        times = [bar.median_ms for bar in chosen]
        axes.barh(rows, times, 0.62, edgecolor="white", linewidth=0, **style, **error_bars(chosen))


def label_bars(axes: Axes, bars: Sequence[Bar], before: Sequence[float], ends: Sequence[float]) -> None:
    """Name the rows, and write times and the changes against `before` at their `ends`."""
    for row, (bar, other, end) in enumerate(zip(bars, before, ends, strict=True)):
        change = f", {signed_percent(bar.median_ms / other - 1)}" if row else ""
        note(axes, f"{number(bar.median_ms)} ms{change}", (end, row), (6, 0), va="center")
    axes.set_xlim(0, 1.22 * max(ends))
    horizontal_bars(axes, [bar.name for bar in bars], "ms")


def range_bars(ranges: Sequence[Bar]) -> Figure:
    """Draw the host's time in each profiler range, and beside it the device's where it is known."""
    on_device = any(bar.device_ms is not None for bar in ranges)
    height = 0.36 if on_device else 0.62
    figure, (axes,) = axes_of((0.42 if on_device else 0.3) * len(ranges) + 0.9)
    host_y = np.arange(len(ranges)) - (height / 2 if on_device else 0)
    times = [max(0.0, bar.median_ms) for bar in ranges]
    axes.barh(host_y, times, height, color=BLUE, label="host, median and quartiles", **error_bars(ranges))
    ends = [max(time, bar.q3_ms) for time, bar in zip(times, ranges, strict=True)]
    for y, time, end in zip(host_y, times, ends, strict=True):
        note(axes, number(time), (end, y), (4, 0), va="center")
    if on_device:
        device = [bar.device_ms or 0.0 for bar in ranges]
        axes.barh(host_y + height, device, height, color=ORANGE, label="device")
        for y, time in zip(host_y + height, device, strict=True):
            note(axes, number(time), (time, y), (4, 0), va="center")
        ends += device
    axes.set_xlim(0, 1.1 * max(ends) or 1.0)
    horizontal_bars(axes, [bar.name for bar in ranges], "ms in a step")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def memory_curve(curve: Sequence[Point], peak: str) -> Figure:
    """Draw MiB over milliseconds, and `peak` in words at the highest point."""
    figure, (axes,) = axes_of(2.9)
    times_ms, mib = zip(*curve, strict=True)
    axes.fill_between(times_ms, mib, step="post", color=PALE, linewidth=0, rasterized=True)
    axes.step(times_ms, mib, where="post", color=BLUE, linewidth=1.2)
    ms, highest = max(curve, key=lambda point: point[1])
    axes.plot([ms], [highest], "o", color=VERMILION, markersize=6)
    fraction = (ms - times_ms[0]) / ((times_ms[-1] - times_ms[0]) or 1.0)
    side = "left" if fraction < 0.3 else "right" if fraction > 0.7 else "center"
    note(axes, shorten(peak, 80), (ms, highest), (0, 8), ha=side)
    axes.set_ylim(0, 1.2 * highest or 1.0)
    axes.margins(x=0.01)
    axes.set_xlabel("ms since the first recorded step began")
    axes.set_ylabel("MiB")
    axes.grid(axis="y")
    return figure


class Dot(NamedTuple):
    """Holds a point of the roofline; both coordinates are above 0."""

    name: str
    flop_per_byte: float
    tflop_s: float


def roofline(bandwidth_gb_s: float, gemm_tflop_s: float, total: Dot | None, ranges: Sequence[Dot]) -> Figure:
    """Draw what each profiler range reaches under the measured memory bandwidth and GEMM, as numbered points."""
    figure, (axes,) = axes_of(3.6)
    dots = [dot for dot in (total, *ranges) if dot]
    ridge = 1e3 * gemm_tflop_s / bandwidth_gb_s
    along = [ridge / 10, ridge * 10, *(dot.flop_per_byte * factor for dot in dots for factor in (0.5, 2))]
    low, high = min(along), max(along)
    ceiling = (bandwidth_gb_s * low / 1e3, gemm_tflop_s, gemm_tflop_s)
    axes.loglog((low, ridge, high), ceiling, color=INK, linewidth=1.6)
    bottom = min([ceiling[0], *(dot.tflop_s for dot in dots)]) / 2
    axes.set(xlim=(low, high), ylim=(bottom, 3 * gemm_tflop_s), xlabel="FLOP per byte moved at least", ylabel="TFLOP/s")
    note(axes, f"GEMM, {number(gemm_tflop_s)} TFLOP/s", (high, gemm_tflop_s), (-2, 5), ha="right")
    # above the ceiling, where no point can be
    note(axes, f"memory bandwidth, {number(bandwidth_gb_s)} GB/s", (ridge, gemm_tflop_s), (-8, 5), ha="right")
    for mark, dot in enumerate(dots, start=0 if total else 1):
        # the total is a ring around a range that covers it
        colour, text, size = (VERMILION, "Σ", 19) if dot is total else (BLUE, str(mark), 13)
        xy, label = (dot.flop_per_byte, dot.tflop_s), f"{text}  {shorten(dot.name)}, {number(dot.tflop_s)} TFLOP/s"
        axes.plot(*xy, "o", color=colour, markersize=size, markeredgecolor="white", label=label, zorder=3 + mark)
        axes.text(*xy, text, color="white", ha="center", va="center_baseline", weight="bold", zorder=3.5 + mark)
    log_ticks(axes.xaxis, axes.yaxis)
    axes.grid()
    if dots:
        figure.legend(loc="outside right upper", handlelength=0, handletextpad=0, markerscale=0)
    return figure


def outputs(pairs: Sequence[Point], edges_log10: Sequence[float], counts: Sequence[float]) -> Figure:
    """Draw outputs here over the reference's in float64, and how many outputs err by how much."""
    figure, (left, right) = axes_of(2.6, columns=2)
    values = [value for pair in pairs for value in pair] or [0.0, 1.0]
    ends = (min(values), max(values))
    left.plot(ends, ends, color=QUIET, linewidth=0.8)
    left.plot(
        *zip(*pairs, strict=True) if pairs else ((), ()), "o", color=BLUE, markersize=3, alpha=0.5, rasterized=True
    )
    left.set(title=f"{len(pairs)} logits", xlabel="reference in float64", ylabel="here")
    edges = [10.0**edge for edge in edges_log10]
    if len(counts):
        right.stairs(counts, edges, fill=True, color=BLUE)
        right.set_xscale("log")
        log_ticks(right.xaxis)
    right.set(title="all logits", xlabel="absolute error", ylabel="logits")
    for axes in (left, right):
        axes.grid()
    return figure


def loss_curves(losses: Mapping[str, Sequence[float | None]]) -> Figure:
    """Draw loss over steps, a line each, the first one broad beneath the others; what is not finite leaves a gap."""
    figure, (axes,) = axes_of(3.0)
    colours = (SKY, VERMILION, GREEN, PURPLE, INK, ORANGE)
    for index, (name, curve) in enumerate(losses.items()):
        values = np.array([np.nan if value is None else value for value in curve], dtype=float)
        values[~np.isfinite(values)] = np.nan
        style: dict[str, Any] = {"linewidth": 6, "alpha": 0.6} if index == 0 else {"linewidth": 1.4}
        known = np.pad(np.isfinite(values), 1)
        style |= {"marker": ".", "markevery": known[1:-1] & ~known[:-2] & ~known[2:]}  # or one between gaps is unseen
        style |= {
            "color": colours[index % len(colours)],
            "linestyle": LINE_STYLES[max(0, index - 1) % len(LINE_STYLES)],
        }
        axes.plot(range(1, len(values) + 1), values, label=shorten(name), **style)
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid()
    if losses:
        figure.legend(loc="outside right upper")
    return figure


def accuracy_curves(curves: Mapping[str, Sequence[Sequence[tuple[float, float, float]]]], minutes: float) -> Figure:
    """Draw AP50 over minutes of training: a thin line a seed, a broad one for the median at each evaluation's time."""
    figure, (axes,) = axes_of(3.4)
    colours = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
    for index, (name, runs) in enumerate(curves.items()):
        style: dict[str, Any] = {
            "color": colours[index % len(colours)],
            "linestyle": LINE_STYLES[index // len(colours)],
        }
        for points in runs:
            axes.plot([0, *(point[0] / 60 for point in points)], [0, *(point[2] for point in points)], lw=0.6, **style)
        times = np.linspace(0, minutes, 61)
        values = [np.interp(times, [0, *(p[0] / 60 for p in run)], [0, *(p[2] for p in run)]) for run in runs]
        axes.plot(times, np.median(values, axis=0), lw=2.2, label=shorten(name, 60), **style)
    axes.set(xlabel="minutes of training", ylabel="AP50", xlim=(0, minutes), ylim=(0, 1))
    axes.grid()
    figure.legend(loc="outside lower left", ncols=2)
    return figure
