"""The embedded data set: JPEG files of drawn shapes with a COCO json, made from a seed, cached in a folder.

Six shapes are the classes; colour, texture, size, rotation, overlap and clutter vary and tell nothing of the class.
`shapes:64` is the easiest: objects span 16 to 36 pixels. At a larger side objects may still be 16 pixels small, so they
cover less of the image.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detr_fast.config import require
from detr_fast.files import atomic_folder, explained, open_growing, write_json
from detr_fast.paths import cache_folder

VERSION = 1
"""Counts up whenever the generator draws something else, so that no stale cache is read."""
SUPERSAMPLING = 3
SMALLEST_PX = 16
LARGEST_FRACTION = 0.56
MOST_OBJECTS = 5
JPEG_QUALITY = 92
SPLIT_SIZES = {"train": 8000, "val": 500}
CACHE_ADVICE = "Free some space, or set DETR_FAST_CACHE to a folder that can be written."


def regular(points: int, start: float = -math.pi / 2) -> list[tuple[float, float]]:
    return [
        (math.cos(start + 2 * math.pi * i / points), math.sin(start + 2 * math.pi * i / points)) for i in range(points)
    ]


def star() -> list[tuple[float, float]]:
    outer, inner = regular(5), regular(5, -math.pi / 2 + math.pi / 5)
    return [point for i in range(5) for point in (outer[i], (inner[i][0] * 0.42, inner[i][1] * 0.42))]


def cross(arm: float = 0.34) -> list[tuple[float, float]]:
    corner = [(-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)]
    return corner + [(-x, -y) for x, y in corner]


OUTLINES: dict[str, Callable[[], list[tuple[float, float]]]] = {
    "circle": lambda: regular(40),
    "square": lambda: regular(4, math.pi / 4),
    "triangle": lambda: regular(3),
    "star": star,
    "cross": cross,
    "ring": lambda: regular(40),
}
"""Each class's outline in the unit disc; a ring is a circle with a hole."""
CLASSES = tuple(OUTLINES)


@dataclass(frozen=True)
class Drawing:
    """An image (S, S, 3) uint8 with its objects: labels into CLASSES and boxes xyxy in pixels."""

    image: np.ndarray
    labels: list[int]
    boxes_xyxy_px: list[tuple[float, float, float, float]]


def shape_coverage(rng: np.random.Generator, name: str, side: int) -> np.ndarray:
    """Draw a shape: how much of each pixel of a (side, side) canvas it covers, float32 in [0, 1]."""
    big = side * SUPERSAMPLING
    canvas = Image.new("L", (big, big))
    draw = ImageDraw.Draw(canvas)
    turn = rng.uniform(-0.3, 0.3)
    stretch = rng.uniform(0.8, 1.0, size=2)
    points = np.array(OUTLINES[name]()) * stretch
    rotated = points @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    rotated = rotated / np.abs(rotated).max()
    draw.polygon([tuple(point) for point in (rotated * 0.48 + 0.5) * big], fill=255)
    if name == "ring":
        draw.polygon([tuple(point) for point in (rotated * 0.25 + 0.5) * big], fill=0)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw grey clutter (side, side, 3) float32: a soft gradient, thin strokes and noise."""
    coarse = Image.fromarray(rng.integers(60, 190, size=(4, 4), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(coarse)
    for _ in range(rng.integers(2, 7)):
        ends = rng.uniform(-0.1, 1.1, size=4) * side
        draw.line(
            [(ends[0], ends[1]), (ends[2], ends[3])], fill=int(rng.integers(30, 220)), width=int(rng.integers(1, 3))
        )
    grey = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 8, size=(side, side)).astype(np.float32)
    return np.repeat(grey[..., None], 3, axis=2) + rng.normal(0, 6, size=3).astype(np.float32)


def paint(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw a saturated colour with stripes, checks or noise on it, (side, side, 3) float32."""
    hue = rng.uniform(0, 1) * 6 + np.array([0.0, 4.0, 2.0])
    colour = np.clip(np.abs(hue % 6 - 3) - 1, 0, 1) * rng.uniform(170, 255) + rng.uniform(0, 40)
    y, x = np.mgrid[:side, :side]
    period = rng.uniform(3, 7)
    pattern = (
        np.zeros((side, side)),
        np.sin(2 * math.pi * (x * math.cos(period) + y * math.sin(period)) / period),
        np.sign(np.sin(math.pi * x / period) * np.sin(math.pi * y / period)),
        rng.normal(0, 1, size=(side, side)),
    )[rng.integers(4)]
    return (colour + pattern[..., None] * rng.uniform(10, 30)).astype(np.float32)


def draw_image(seed: int, index: int, side: int) -> Drawing:
    """Draw one image, the same for the same (seed, index, side)."""
    rng = np.random.default_rng((seed, index, side))
    image = background(rng, side)
    labels: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        label = int(rng.integers(len(CLASSES)))
        span = int(rng.integers(SMALLEST_PX, int(side * LARGEST_FRACTION) + 1))
        coverage = shape_coverage(rng, CLASSES[label], span)
        rows, columns = np.flatnonzero(coverage.max(1) > 0.3), np.flatnonzero(coverage.max(0) > 0.3)
        for _ in range(12):
            left, top = (int(corner) for corner in rng.integers(0, side - span + 1, size=2))
            box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            if all(overlap_fraction(box, other) < 0.25 for other in boxes):
                break
        else:
            continue
        window = image[top : top + span, left : left + span]
        window += coverage[..., None] * (paint(rng, span) - window)
        labels.append(label)
        boxes.append(tuple(float(edge) for edge in box))  # type: ignore[arg-type]
    return Drawing(np.clip(image, 0, 255).astype(np.uint8), labels, boxes)


def overlap_fraction(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the intersection of two boxes xyxy as a fraction of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def write_images(folder: Path, seed: int, side: int, indices: range) -> list[Drawing]:
    drawings = []
    for index in indices:
        drawing = draw_image(seed, index, side)
        with open_growing(folder / f"{index:06d}.jpg", advice=CACHE_ADVICE) as file:
            Image.fromarray(drawing.image).save(file, "JPEG", quality=JPEG_QUALITY)
        drawings.append(drawing)
    return drawings


def write_split(root: Path, split: str, seed: int, side: int, count: int) -> None:
    """Draw `count` images into `root/split/*.jpg`, and their COCO annotations into `root/annotations/split.json`."""
    folder = root / split
    folder.mkdir(parents=True)
    parts = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(parts))) as pool:
        written = pool.map(write_images, repeat(folder), repeat(seed), repeat(side), parts)
        drawings = [drawing for part in written for drawing in part]
    annotations: list[dict[str, object]] = []
    for index, drawing in enumerate(drawings):
        for label, (x0, y0, x1, y1) in zip(drawing.labels, drawing.boxes_xyxy_px, strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
    images = [{"id": i, "file_name": f"{i:06d}.jpg", "width": side, "height": side} for i in range(count)]
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / f"{split}.json", document, indent=None)


def is_shapes(data: str) -> bool:
    """Tell whether --data names the embedded data set and no folder."""
    return data.split(":")[0] == "shapes"


def parse_shapes(data: str) -> int:
    """Return the image side in pixels that `shapes` or `shapes:SIDE` asks for. Raises UserError for anything else."""
    _, _, side = data.partition(":")
    require(
        data == "shapes" or (side.isdecimal() and 48 <= int(side) <= 1024),
        f"--data {data}: give shapes:SIDE with SIDE 48 to 1024.",
    )
    return int(side or 64)


def ensure_shapes(side: int, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Return the data set's root, drawn first if it is not in the cache. A half-written one is never seen.

    Raises UserError where the cache cannot be written.
    """
    sizes = sizes or SPLIT_SIZES
    counts = "-".join(str(count) for count in sizes.values())
    root = cache_folder() / f"shapes-v{VERSION}-{side}px-seed{seed}-{counts}"
    with explained(root, CACHE_ADVICE):
        if root.is_dir():
            return root
    with atomic_folder(root, CACHE_ADVICE) as partial:
        for number, (split, count) in enumerate(sizes.items()):
            write_split(partial, split, seed * len(sizes) + number, side, count)
    return root
