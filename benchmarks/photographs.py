"""A data set as large as photographs are, made on the spot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.clock import DEVICE

PHOTOGRAPHS = 32 if DEVICE.type == "cuda" else 8
HEIGHT, WIDTH = 480, 640
OBJECTS = 7


def write_photographs(root: Path) -> Path:
    """Write JPEG files and COCO json as train and as val split; about 100 kB a file, as COCO's have."""
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    (root / "val2017").symlink_to(root / "train2017")
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for image in range(PHOTOGRAPHS):
        draw_photograph(rng).save(root / "train2017" / f"{image}.jpg", quality=90)
        corner = rng.uniform(0, 0.6, (OBJECTS, 2)) * (WIDTH, HEIGHT)
        extent = rng.uniform(0.05, 0.4, (OBJECTS, 2)) * (WIDTH, HEIGHT)
        for box, area in zip(np.hstack((corner, extent)).tolist(), extent.prod(1).tolist(), strict=True):
            label = {"id": len(annotations) + 1, "image_id": image, "category_id": int(rng.integers(1, 91))}
            annotations.append(label | {"bbox": box, "area": area, "iscrowd": 0})
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(PHOTOGRAPHS)],
        "annotations": annotations,
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, 91)],
    }
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    return root


def draw_photograph(rng: np.random.Generator) -> Image.Image:
    """Draw soft large shapes, edges and a little grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    middle = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    size = (WIDTH, HEIGHT)
    soft = np.asarray(Image.blend(coarse.resize(size, Image.Resampling.BICUBIC), middle.resize(size), 0.3), np.float32)
    grain = rng.normal(0, 8, (HEIGHT, WIDTH, 1))
    return Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8))
