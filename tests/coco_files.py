"""COCO documents for tests; the fixture `write` makes files of them, beside images of 60 x 40 pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[Any], Path]


def annotation(id: int, bbox: list[float], category_id: int = 1, image_id: int = 1, **more: Any) -> dict[str, Any]:
    box = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0}
    return {**box, "area": bbox[2] * bbox[3], **more}


def document(*annotations: dict[str, Any], images: int = 2) -> dict[str, Any]:
    """`images` images of 60 x 40 pixels with ids from 1, categories 1 and 2."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in range(1, images + 1)],
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
