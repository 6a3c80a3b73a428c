"""COCO annotations, read, checked and cleaned: a fault is mended where it can be, else an error that names the id."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detr_fast.config import UserError, require
from detr_fast.data.box_formats import ROUNDING_PX, likely_formats
from detr_fast.data.corrections import Corrections
from detr_fast.data.rows import (
    LARGEST_NUMBER,
    Row,
    is_number,
    name_of,
    refuse_duplicates,
    refuse_negative,
    require_rows,
    whole_numbers,
)

RELATIVE_AREA_LEAST_PX = 100
"""Smallest box whose area, if below a square pixel, must be relative to the image."""


@dataclass(frozen=True)
class Category:
    """A class as the data set names it."""

    id: int
    name: str

    def __str__(self) -> str:
        """Write id and name, as messages have them."""
        return f"{self.id} {self.name!r:.100}"


@dataclass(frozen=True)
class ImageEntry:
    """An image as the json describes it, sizes in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Annotations:
    """A cleaned COCO file. Images and categories in ascending id order, annotations (N) in the file's."""

    file: Path
    images: tuple[ImageEntry, ...]
    categories: tuple[Category, ...]
    ids: np.ndarray
    """(N,) int64, distinct, at least 1."""
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh_px: np.ndarray
    """(N, 4) float64, as the file gives them."""
    boxes_xyxy_px: np.ndarray
    """(N, 4) float32, clamped to the image."""
    areas: np.ndarray
    """(N,) float64, in square pixels."""
    crowd: np.ndarray
    """(N,) bool: a group of objects, not trained on and ignored in evaluation."""
    corrections: Corrections

    def document(self) -> dict[str, Any]:
        """Return a COCO dict for an evaluator: with crowds, and boxes not clamped, as COCO evaluates them."""
        columns = (self.ids, self.image_ids, self.category_ids, self.boxes_xywh_px, self.areas, self.crowd)
        names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        rows = zip(*(column.tolist() for column in (*columns[:-1], columns[-1].astype(int))), strict=True)
        return {
            "images": [vars(image).copy() for image in self.images],
            "annotations": [dict(zip(names, row, strict=True)) for row in rows],
            "categories": [vars(category).copy() for category in self.categories],
        }


def read_annotations(file: Path) -> Annotations:
    """Read, check and clean a COCO json. Raises UserError that names the file and the line, or the id that is wrong."""
    document = load_json(file)
    images = read_images(file, section(file, document, "images"))
    categories = read_categories(file, section(file, document, "categories"))
    rows = section(file, document, "annotations")
    boxes = read_boxes(file, rows)
    columns = {
        "ids": distinct_ids(rows),
        "image_ids": whole_numbers(file, rows, "annotation", "image_id"),
        "category_ids": whole_numbers(file, rows, "annotation", "category_id"),
        "boxes_xywh_px": boxes,
        "areas": read_areas(file, rows, boxes),
        "crowd": read_crowd(file, rows),
    }
    refuse_unlisted_categories(file, rows, columns["category_ids"], categories)
    size_of = {image.id: (image.width, image.height) for image in images}
    sizes = np.array([size_of.get(id_, (0, 0)) for id_ in columns["image_ids"].tolist()]).reshape(-1, 2)
    columns["boxes_xyxy_px"], clamped, empty = clamp_boxes(boxes, sizes)
    listed = np.asarray(sizes.all(axis=1))
    keep = listed & ~empty
    columns["areas"], wrong_area = correct_areas(columns["areas"], boxes, sizes)
    formats = [(words, np.flatnonzero(listed)[which]) for words, which in likely_formats(boxes[listed], sizes[listed])]
    below_pixel = keep & (boxes[:, 2:] < 1).any(axis=1)
    for _, positions in formats:
        below_pixel[positions] = False
    corrections = Corrections(
        dropped_empty=ids_where(rows, listed & empty),
        dropped_unlisted=ids_where(rows, ~listed),
        clamped=ids_where(rows, keep & clamped),
        defaulted_crowd=sum("iscrowd" not in row for row in rows),
        defaulted_area=sum(row.get("area") is None for row in rows),
        renumbered=columns["ids"].tolist() != [row.get("id") for row in rows],
        corrected_area=ids_where(rows, keep & wrong_area),
        likely_formats=tuple((words, names_of(rows, positions)) for words, positions in formats),
        below_pixel=ids_where(rows, below_pixel),
        unnamed=sum(row.get("name") is None for row in document["categories"]),
    )
    kept = {name: column[keep] for name, column in columns.items()}
    return Annotations(file=file, images=images, categories=categories, corrections=corrections, **kept)


def read_crowd(file: Path, rows: list[Row]) -> np.ndarray:
    """Read `iscrowd` as (rows,) bool. Raises UserError for an `iscrowd` that is neither 0 nor 1."""
    require_rows(file, "annotation", rows, lambda row: row.get("iscrowd", 0) in (0, 1), "iscrowd", "0 or 1")
    return np.array([row.get("iscrowd", 0) for row in rows], dtype=bool)


def load_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}: not valid json at line {error.lineno}, column {error.colno}: {error.msg}. "
            "Is the file complete? Write or copy it anew."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file in UTF-8 ({error}).") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply to be COCO json.") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{file}: not valid json: {error}.") from error
    require(isinstance(document, dict), f"{file}: COCO json is an object with images, annotations and categories.")
    return document


def section(file: Path, document: dict[str, Any], key: str) -> list[Row]:
    """Return the list of objects under `key`. Raises UserError where it is no such list."""
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: {key!r} must be a list of objects, as in COCO json.")
    return rows


def names_of(rows: list[Row], positions: np.ndarray) -> tuple[Any, ...]:
    return tuple(name_of(rows[position], position) for position in positions.tolist())


def ids_where(rows: list[Row], mask: np.ndarray) -> tuple[Any, ...]:
    return names_of(rows, np.flatnonzero(mask))


def distinct_ids(rows: list[Row]) -> np.ndarray:
    """Return (rows,) int64: the annotations' ids, or 1, 2, ... where they are not distinct whole numbers from 1 on."""
    ids = [row.get("id") for row in rows]
    usable = all(type(id_) is int and 1 <= id_ < LARGEST_NUMBER for id_ in ids) and len(set(ids)) == len(ids)
    return np.array(ids if usable else range(1, len(rows) + 1), dtype=np.int64)


def read_images(file: Path, rows: list[Row]) -> tuple[ImageEntry, ...]:
    columns = [whole_numbers(file, rows, "image", key).tolist() for key in ("id", "width", "height")]
    refuse_duplicates(file, "image", columns[0])
    refuse_negative(file, "image", columns[0])
    require_rows(file, "image", rows, lambda row: is_text(row.get("file_name")), "file_name", "a name")
    for key in ("width", "height"):
        require_rows(file, "image", rows, lambda row, key=key: row[key] > 0, key, "positive")  # type: ignore[misc]
    require(len(rows) > 0, f"{file}: lists no images.")
    names = [row["file_name"] for row in rows]
    images = [ImageEntry(id_, *others) for id_, *others in zip(columns[0], names, *columns[1:], strict=True)]
    return tuple(sorted(images, key=lambda image: image.id))


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def read_categories(file: Path, rows: list[Row]) -> tuple[Category, ...]:
    """Return the categories by ascending id; one without a name is called by its id."""
    ids = whole_numbers(file, rows, "category", "id").tolist()
    refuse_duplicates(file, "category", ids)
    require(len(ids) > 0, f"{file}: lists no categories.")
    refuse_negative(file, "category", ids)
    require_rows(
        file, "category", rows, lambda row: isinstance(row.get("name"), str | int | float | None), "name", "text"
    )
    names = [id_ if row.get("name") is None else row["name"] for id_, row in zip(ids, rows, strict=True)]
    categories = (Category(id_, str(name)) for id_, name in zip(ids, names, strict=True))
    return tuple(sorted(categories, key=lambda category: category.id))


def refuse_unlisted_categories(
    file: Path, rows: list[Row], category_ids: np.ndarray, categories: Sequence[Category]
) -> None:
    known = [category.id for category in categories]
    unlisted = np.flatnonzero(~np.isin(category_ids, known)).tolist()
    if unlisted:
        examples = ", ".join(f"annotation {name_of(rows[i], i)} has {category_ids[i]}" for i in unlisted[:5])
        raise UserError(f"{file}: {len(unlisted)} annotations have a category that 'categories' lacks: {examples}.")


def read_boxes(file: Path, rows: list[Row]) -> np.ndarray:
    """Read `bbox` as (rows, 4) float64. Raises UserError for one that is no box."""
    must = "four finite numbers x, y, width, height"
    if any(row.get("bbox") is None and row.get("segmentation") for row in rows):
        must += " (of a segmentation without one: its least x and y, and how far it reaches from there)"
    require_rows(file, "annotation", rows, lambda row: is_box(row.get("bbox")), "bbox", must)
    return np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)


def is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def read_areas(file: Path, rows: list[Row], boxes_xywh_px: np.ndarray) -> np.ndarray:
    """Read `area` as (rows,) float64, from the boxes where the file has none."""
    good = lambda row: row.get("area") is None or is_number(row["area"])  # noqa: E731 (one line, used once)
    require_rows(file, "annotation", rows, good, "area", "a finite number")
    given = np.array([np.nan if row.get("area") is None else row["area"] for row in rows], dtype=np.float64)
    return np.where(np.isnan(given), boxes_xywh_px[:, 2:].prod(axis=1), given)


def correct_areas(areas: np.ndarray, boxes_xywh_px: np.ndarray, sizes_wh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace areas (N,) that cannot be an object's by its box's, and return which (N,) were replaced.

    Evaluation sorts objects by area into small, medium and large.
    """
    of_boxes, of_images = boxes_xywh_px[:, 2:].prod(axis=1), sizes_wh.astype(np.float64).prod(axis=1)
    relative = (areas < 1) & (of_boxes >= RELATIVE_AREA_LEAST_PX)
    wrong = ((areas <= 0) | relative | (areas > of_images)) & (areas != of_boxes)
    return np.where(wrong, of_boxes, areas), wrong


def clamp_boxes(boxes_xywh_px: np.ndarray, sizes_wh: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clamp boxes to images of `sizes_wh` (N, 2): corners (N, 4) float32, which were cut, and which are empty."""
    low, extent = np.split(boxes_xywh_px.astype(np.float32), 2, axis=1)
    corners = np.concatenate((low, low + extent), axis=1)
    inside = np.clip(corners, 0, np.tile(sizes_wh, 2)).astype(np.float32)
    cut = (np.abs(inside - corners) > ROUNDING_PX).any(axis=1)
    empty = (inside[:, 2:] <= inside[:, :2]).any(axis=1)
    return inside, np.asarray(cut), np.asarray(empty)
