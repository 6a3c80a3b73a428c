"""Photographs as batches, and scores and boxes as objects: the two ends of `Detector.predict`.

Images are resized as in evaluation. EXIF rotation is ignored, as everywhere (see data/decode.py): boxes refer to the
pixels as they are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast.config import ModelConfig, UserError, require
from detr_fast.data.annotations import Category
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.data.buckets import shape_batches
from detr_fast.data.decode import decode_image, faults_named, rgb_pixels
from detr_fast.data.headers import read_header
from detr_fast.data.transforms import resized_sizes

ImageLike = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or pixels (H, W, 3) uint8."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Objects found on one image, best first; tensors are on the CPU."""

    labels: Tensor
    """(N,) int64"""
    names: list[str]
    """The labels' class names, or their numbers where the model does not know them."""
    scores: Tensor
    """(N,) float32 in [0, 1]"""
    boxes_xyxy_px: Tensor
    """(N, 4) float32, in pixels of the image as it was given"""

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return one entry an object, of plain numbers and text."""
        columns = (self.labels.tolist(), self.names, self.scores.tolist(), self.boxes_xyxy_px.tolist())
        keys = ("label", "name", "score", "box_xyxy_px")
        return {"detections": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]}


def prediction_batches(config: ModelConfig, images: Sequence[ImageLike], batch_size: int) -> list[list[int]]:
    """Return the indices of `images`, each once, as batches whose shapes are alike once they are resized.

    Raises UserError for a `batch_size` below 1.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}.")
    if batch_size == 1:  # nothing is padded, and no header need be read
        return [[index] for index in range(len(images))]
    sizes = np.array([size_of(image) for image in images], dtype=np.int64).reshape(-1, 2)
    return shape_batches(resized_sizes(sizes, config.image_size, config.max_size), batch_size)


def size_of(image: ImageLike) -> tuple[int, int]:
    """Return (h, w), a file's from its header; (1, 1) for what is no image, as reading it will say why."""
    if isinstance(image, str | Path):
        header = read_header(Path(image))
        return header.size if header else (1, 1)
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else (*np.shape(image), 1, 1)[:2]
    return max(height, 1), max(width, 1)


def read_pixels(image: ImageLike) -> Tensor:
    """Read an image as uint8 (3, h, w). Raises UserError for what is no image."""
    if isinstance(image, str | Path):
        return decode_image(Path(image))
    array = read_pil(image) if isinstance(image, Image.Image) else image
    if not (isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3):
        form = f"array {array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"An image must be a path, a PIL image or an array (H, W, 3) uint8, not {form}.")
    require(array.size > 0, f"An image of {array.shape[1]}x{array.shape[0]} pixels has nothing on it.")
    return torch.from_numpy(np.require(array, requirements=("C", "W"))).permute(2, 0, 1)  # torch warns of read-only


def read_pil(image: Image.Image) -> np.ndarray:
    """Read a PIL image, which may not have been loaded from its file yet, as (H, W, 3) uint8."""
    with faults_named(f"The PIL image {getattr(image, 'filename', '')}"):
        return rgb_pixels(image)


def make_batch(config: ModelConfig, pixels: Sequence[Tensor]) -> Batch:
    """Collate images uint8 (3, h, w) as at evaluation; they are numbered from 0 and have no targets."""
    no_labels, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    own = [(image.shape[1], image.shape[2]) for image in pixels]
    resized = resized_sizes(np.array(own), config.image_size, config.max_size).tolist()
    return collate(
        [
            Sample(image, no_labels, no_boxes, number, own[number], tuple(resized[number]))
            for number, image in enumerate(pixels)
        ]
    )


def require_threshold(threshold: float) -> None:
    """Raise UserError where `threshold` is no score."""
    require(0 <= threshold <= 1, f"The threshold must be between 0 and 1, got {threshold}.")


def keep_best(
    categories: Sequence[Category] | None, threshold: float, scores: Tensor, labels: Tensor, boxes_xyxy_px: Tensor
) -> Detections:
    """Return the queries (Q,) of one image with at least `threshold` as score, best first, with their classes' names.

    Raises UserError for scores or boxes that are not finite.
    """
    # a NaN compares as below any threshold: without this, a broken model would find nothing and look healthy
    if not (scores.isfinite().all() and boxes_xyxy_px.isfinite().all()):
        raise UserError(
            "The model's scores or boxes are not finite. Its weights hold NaN, or values overflowed in fp16."
        )
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= threshold]
    labels = labels[order]
    names = [str(label) if categories is None else categories[label].name for label in labels.tolist()]
    return Detections(labels, names, scores[order], boxes_xyxy_px[order])
