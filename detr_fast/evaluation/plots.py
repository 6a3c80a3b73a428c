"""A run's curves as PNG files: losses, average precision, precision over recall. Drawn offline, without a display."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detr_fast.config import UserError
from detr_fast.evaluation.coco_metrics import Evaluation
from detr_fast.evaluation.fonts import FONTS, one_line
from detr_fast.files import atomic_write

DOTS_PER_INCH = 120
LOSSES = {"loss": "loss, weighted sum", "loss_ce": "class", "loss_bbox": "box, L1", "loss_giou": "box, GIoU"}
PRECISIONS = {
    "over IoU thresholds": {"AP": "AP, 0.50 to 0.95", "AP50": "AP50", "AP75": "AP75"},
    "by the objects' size": {"APs": "small, below 32² px", "APm": "medium", "APl": "large, above 96² px"},
}
NAMED_CURVES = 20
"""Most classes whose curves are named; beyond, only the mean's is."""
LONGEST_NAME = 24
TRAIN_COLOUR, VAL_COLOUR = "#9ecae1", "#d95f02"
SMOOTH_COLOUR = "#2171b5"


def draw_loss_curves(metrics_csv: Path, path: Path) -> None:
    """Draw losses over optimizer steps, one panel a term: logged values, their running mean, and the validation's."""
    rows = read_metrics(metrics_csv)
    figure = new_figure(width=10, height=6.4)
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, LOSSES.items(), strict=True):
        steps, values = column(rows, "train", "step", name)
        axes.plot(steps, values, color=TRAIN_COLOUR, linewidth=0.8, label="training")
        if len(values) >= 10:
            axes.plot(steps, running_mean(values), color=SMOOTH_COLOUR, linewidth=1.6, label="its running mean")
        steps, values = column(rows, "val", "step", name)
        if len(values):
            axes.plot(steps, values, "o-", color=VAL_COLOUR, markersize=3.5, linewidth=1.4, label="validation")
        finish_axes(axes, title, "optimizer step")
    save_figure(figure, path)


def draw_ap_curves(metrics_csv: Path, path: Path) -> None:
    """Draw average precision on the validation images over epochs."""
    rows = read_metrics(metrics_csv)
    figure = new_figure(width=10, height=3.8)
    for axes, (title, names) in zip(figure.subplots(1, 2), PRECISIONS.items(), strict=True):
        for name, label in names.items():
            epochs, values = column(rows, "val", "epoch", name)
            measured = values >= 0  # -1: the data has no such objects
            if measured.any():
                axes.plot(epochs[measured], values[measured], "o-", markersize=3.5, label=label)
        finish_axes(axes, f"average precision {title}", "epoch")
        axes.set_ylim(0, 1)
    save_figure(figure, path)


def draw_precision_recall(evaluation: Evaluation, path: Path, shown: Mapping[str, str] | None = None) -> None:
    """Draw precision over recall at IoU 0.50, one curve a class and their mean; `shown`: what to call the classes."""
    shown = shown or {}
    curves = evaluation.curves
    figure = new_figure(width=7.5, height=5.2)
    axes = figure.subplots()
    named = len(curves.names) <= NAMED_CURVES
    for name, precision in zip(curves.names, curves.precision, strict=True):
        label = f"{shorten(shown.get(name, name))}  {evaluation.per_class[name]['AP50']:.3f}"
        style = {"label": label} if named else {"alpha": 0.25}
        axes.plot(curves.recall, precision, linewidth=1.1, **style)
    if len(curves.names):
        label = f"mean of {len(curves.names)}  {evaluation.metrics['AP50']:.3f}"
        axes.plot(curves.recall, curves.precision.mean(axis=0), color="black", linewidth=2.2, label=label)
    point = evaluation.operating_point
    title = "precision and recall at IoU 0.50"
    title += (
        f"\nscore at least {point.threshold:.2f}: precision {point.precision:.3f}, recall {point.recall:.3f} (best F1)"
        if len(curves.names)
        else "\nno object to find"
    )
    finish_axes(axes, title, "recall", legend_title="AP50")
    axes.set_ylabel("precision")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    save_figure(figure, path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read the rows of a run's metrics.csv. Raises UserError if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a run's metrics: {error}.") from error


def column(rows: Sequence[dict[str, str]], kind: str, over: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return `over` and `name` (N,) of the rows of `kind` that have both."""
    pairs = [(row[over], row[name]) for row in rows if row.get("kind") == kind and row.get(over) and row.get(name)]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return each value's mean with its neighbours, over about a twentieth of all (N,)."""
    width = max(1, len(values) // 40)
    counted = np.convolve(np.ones(len(values)), np.ones(2 * width + 1), mode="same")
    return np.convolve(values, np.ones(2 * width + 1), mode="same") / counted


def shorten(name: str) -> str:
    name = one_line(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def finish_axes(axes: Axes, title: str, xlabel: str, legend_title: str | None = None) -> None:
    """Add title, grid and, where something is drawn, a legend; every text literally, for names may hold `$`."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    if xlabel == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "no values yet", transform=axes.transAxes, ha="center", va="center", color="grey")
        return
    if any(not str(line.get_label()).startswith("_") for line in axes.lines):
        position = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if legend_title else {"loc": "best"}
        legend = axes.legend(fontsize=8, frameon=False, title=legend_title, **position)
        for text in legend.get_texts():
            text.set_parse_math(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG. Raises UserError where it cannot be written."""
    FONTS.prepare(figure)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
