"""Images with true and predicted boxes drawn on them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from detr_fast.evaluation.fonts import one_line
from detr_fast.evaluation.plots import DOTS_PER_INCH, save_figure, shorten

COLOURS = ("#ff5a5f", "#2ec4ff", "#ffb000", "#7dd957", "#e07bff", "#00d1b2", "#ff8a3d", "#a3a8ff", "#ffe04d")
GRID_CELL_PX = 400
"""Longer side of an image in a grid; one alone keeps its own within the next two."""
SMALLEST_PX, LARGEST_PX = 640, 1600
GAP_PX = 12
LINE_PX = 22
"""Height of a line of text."""


def no_boxes() -> np.ndarray:
    return np.zeros((0, 4))


@dataclass(frozen=True, eq=False)
class Picture:
    """An image (H, W, 3) uint8 with what is on it and what was found; boxes xyxy (N, 4) in its pixels."""

    image: np.ndarray
    title: str = ""
    true_boxes: np.ndarray = field(default_factory=no_boxes)
    true_names: Sequence[str] = ()
    boxes: np.ndarray = field(default_factory=no_boxes)
    names: Sequence[str] = ()
    scores: Sequence[float] = ()


def draw_detections(pictures: Sequence[Picture], path: Path, columns: int = 4, note: str = "") -> None:
    """Write a PNG of all `pictures` in a grid: true boxes dashed white, predicted ones solid in their class's colour.

    `note` is added to the legend. Images are enlarged or reduced, so that the names on them are legible; all text is
    literal. Raises UserError if `path` cannot be written.
    """
    columns = max(1, min(columns, len(pictures)))
    scales = [image_scale(picture, alone=len(pictures) == 1) for picture in pictures]
    widths = [picture.image.shape[1] * scale for picture, scale in zip(pictures, scales, strict=True)]
    heights = [picture.image.shape[0] * scale for picture, scale in zip(pictures, scales, strict=True)]
    cell_width = max(widths, default=GRID_CELL_PX) + GAP_PX
    row_heights = [max(heights[i : i + columns]) + LINE_PX + GAP_PX for i in range(0, len(pictures), columns)]
    width, height = columns * cell_width + GAP_PX, LINE_PX + GAP_PX + sum(row_heights)
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    figure.text(
        GAP_PX / width,
        1 - GAP_PX / height,
        legend(pictures, note),
        fontsize=8,
        va="top",
        color="#444444",
        parse_math=False,
    )
    colours = class_colours(pictures)
    for i, picture in enumerate(pictures):
        left = GAP_PX + i % columns * cell_width
        top = 2 * LINE_PX + GAP_PX + sum(row_heights[: i // columns])
        rectangle = (left / width, 1 - (top + heights[i]) / height, widths[i] / width, heights[i] / height)
        draw_picture(figure.add_axes(rectangle), picture, scales[i], colours)
    save_figure(figure, path)


def image_scale(picture: Picture, alone: bool) -> float:
    """Return drawn pixels for each pixel of the image."""
    longer = max(picture.image.shape[:2])
    return (min(max(longer, SMALLEST_PX), LARGEST_PX) if alone else GRID_CELL_PX) / longer


def class_colours(pictures: Sequence[Picture]) -> dict[str, str]:
    names = sorted({name for picture in pictures for name in picture.names})
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def legend(pictures: Sequence[Picture], note: str) -> str:
    compared = any(len(picture.true_boxes) for picture in pictures)
    text = "dashed: true    solid: predicted, with its score" if compared else "predicted, with its score"
    return f"{text}    {note}"


def draw_picture(axes: Axes, picture: Picture, scale: float, colours: dict[str, str]) -> None:
    height, width = picture.image.shape[:2]
    axes.imshow(picture.image, extent=(0, width, height, 0), interpolation="nearest" if scale > 1 else "antialiased")
    axes.set_axis_off()
    axes.set_title(one_line(picture.title), fontsize=8, loc="left", pad=3, parse_math=False)
    outlined = [withStroke(linewidth=3, foreground="black")]
    for box, name in zip(picture.true_boxes, picture.true_names, strict=True):
        draw_box(axes, box, linestyle=(0, (4, 3)), edgecolor="white", linewidth=1.4, path_effects=outlined)
        draw_name(axes, box, scale, shorten(name), below=True, color="white", path_effects=outlined)
    for box, name, score in zip(picture.boxes, picture.names, picture.scores, strict=True):
        draw_box(axes, box, edgecolor=colours[name], linewidth=1.6)
        background = {"facecolor": colours[name], "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        draw_name(axes, box, scale, f"{shorten(name)} {score:.2f}", below=False, color="black", bbox=background)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def draw_box(axes: Axes, box_xyxy: np.ndarray, **style: object) -> None:
    x0, y0, x1, y1 = (float(edge) for edge in box_xyxy)
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))  # type: ignore[arg-type]


def draw_name(axes: Axes, box_xyxy: np.ndarray, scale: float, text: str, below: bool, **style: object) -> None:
    """Draw `text` at the box's lower or upper edge: outside of it, or inside where the image ends."""
    width, height = axes.get_images()[0].get_extent()[1:3]
    x0, y0, x1, y1 = (float(edge) for edge in box_xyxy)
    line = LINE_PX * 0.8 / scale  # in the image's pixels
    x, align = (x0, "left") if x0 < 0.6 * width else (x1, "right")
    if below:
        y, stand = (y1, "top") if y1 + line <= height else (y1, "bottom")
    else:
        y, stand = (y0, "bottom") if y0 - line >= 0 else (y0, "top")
    axes.text(x, y, text, fontsize=7, ha=align, va=stand, parse_math=False, clip_on=True, **style)  # type: ignore[arg-type]
