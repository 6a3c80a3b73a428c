"""Photographs in, objects out: what `model.predict` and the predict command do.

Images are resized and normalised as at evaluation. EXIF rotation is ignored, as everywhere (see data/decode.py): boxes
refer to the pixels as they are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast.config import UserError, require
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.data.buckets import shape_batches
from detr_fast.data.decode import decode_image, faults_named, rgb_pixels
from detr_fast.data.headers import read_header
from detr_fast.data.transforms import resized_sizes
from detr_fast.evaluation.inference import detect_batch, evaluation_mode, forward_of
from detr_fast.model.detr import DETR
from detr_fast.runtime import Runtime

ImageLike = str | Path | Image.Image | np.ndarray
"""A file, a PIL image, or pixels (H, W, 3) uint8."""


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found on one image, best first; tensors lie on the CPU."""

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


def predict(
    model: DETR,
    images: ImageLike | Sequence[ImageLike],
    threshold: float = 0.7,
    batch_size: int = 1,
    runtime: Runtime | None = None,
) -> list[Detections]:
    """Find the objects with at least `threshold` as score on one image or several, one Detections an image.

    More than one image a batch is faster. Images of like shape share one, whatever their order here; those that are
    smaller are then padded, which changes the numbers a little.
    `runtime`: where and in what precision; default: where the model is, in its own precision. The model's mode is
    restored. Raises UserError for a file that is no image, an array of another form, or outputs that are not finite.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}.")
    several = [images] if isinstance(images, ImageLike) else list(images)
    found: dict[int, Detections] = {}
    for batch in prediction_batches(model, several, batch_size):
        pixels = [read_pixels(several[index]) for index in batch]
        found.update(zip(batch, predict_batch(model, pixels, threshold, runtime), strict=True))
    return [found[index] for index in range(len(several))]


def prediction_batches(model: DETR, images: Sequence[ImageLike], batch_size: int) -> list[list[int]]:
    """Return the indices of `images`, each once, as batches whose shapes are alike once they are resized."""
    if batch_size == 1:  # nothing is padded, and no header need be read
        return [[index] for index in range(len(images))]
    sizes = np.array([size_of(image) for image in images], dtype=np.int64).reshape(-1, 2)
    return shape_batches(resized_sizes(sizes, model.config.image_size, model.config.max_size), batch_size)


def size_of(image: ImageLike) -> tuple[int, int]:
    """Return (h, w); of a file what its header says. (1, 1) for what is no image: reading it will say why."""
    if isinstance(image, str | Path):
        header = read_header(Path(image))
        return header.size if header else (1, 1)
    height, width = (image.height, image.width) if isinstance(image, Image.Image) else (*np.shape(image), 1, 1)[:2]
    return max(height, 1), max(width, 1)


@torch.no_grad()
def predict_batch(
    model: DETR, pixels: Sequence[Tensor], threshold: float, runtime: Runtime | None = None
) -> list[Detections]:
    """Do as `predict`, of decoded images uint8 (3, h, w) in one batch."""
    require(0 <= threshold <= 1, f"The threshold must be between 0 and 1, got {threshold}.")
    runtime = runtime or runtime_of(model)
    batch = make_batch(pixels, model.config.image_size, model.config.max_size).to(runtime.device)
    forward = forward_of(model, runtime)
    with evaluation_mode(model):
        parts = detect_batch(forward, batch, model, runtime)
    on_host = [part.cpu() for part in parts]
    return [keep_best(model, threshold, *one) for one in zip(*on_host, strict=True)]


def read_pixels(image: ImageLike) -> Tensor:
    """Return uint8 (3, h, w). Raises UserError for what is no image."""
    if isinstance(image, str | Path):
        return decode_image(Path(image))
    array = read_pil(image) if isinstance(image, Image.Image) else image
    if not (isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3):
        form = f"array {array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"An image must be a path, a PIL image or an array (H, W, 3) uint8, not {form}.")
    require(array.size > 0, f"An image of {array.shape[1]}x{array.shape[0]} pixels has nothing on it.")
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def read_pil(image: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8; a PIL image may not have been read from its file yet."""
    with faults_named(f"The PIL image {getattr(image, 'filename', '')}"):
        return rgb_pixels(image)


def make_batch(pixels: Sequence[Tensor], size: int, max_size: int) -> Batch:
    """Collate images uint8 (3, h, w) as at evaluation; they are numbered from 0 and have no targets."""
    no_labels, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    own = [(image.shape[1], image.shape[2]) for image in pixels]
    resized = resized_sizes(np.array(own), size, max_size).tolist()
    return collate(
        [
            Sample(image, no_labels, no_boxes, number, own[number], tuple(resized[number]))
            for number, image in enumerate(pixels)
        ]
    )


def keep_best(model: DETR, threshold: float, scores: Tensor, labels: Tensor, boxes_xyxy_px: Tensor) -> Detections:
    """Return, of one image's queries, those with at least `threshold` as score, best first."""
    # a NaN compares as below any threshold: without this, a broken model would find nothing and look healthy
    if not (scores.isfinite().all() and boxes_xyxy_px.isfinite().all()):
        raise UserError(
            "The model's scores or boxes are not finite. Its weights hold NaN, or values overflowed in fp16."
        )
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= threshold]
    labels = labels[order]
    names = [str(label) if model.categories is None else model.categories[label].name for label in labels.tolist()]
    return Detections(labels, names, scores[order], boxes_xyxy_px[order])


def runtime_of(model: DETR) -> Runtime:
    """Describe the model where it is and as it is: nothing moved or compiled, autocast for half-precision weights
    alone."""
    weight = next(model.parameters())
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return Runtime(
        device=weight.device,
        dtype=weight.dtype if half else torch.float32,
        channels_last=model.frozen,
        compile=False,
        kernels="auto",
        attention="auto",
        reasons={},
    )
