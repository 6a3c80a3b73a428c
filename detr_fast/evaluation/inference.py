"""The model run over a data set: every image's detections as the rows that COCO's evaluators read."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from detr_fast.config import UserError
from detr_fast.data.batch import Batch
from detr_fast.data.coco import Category
from detr_fast.data.loader import model_input
from detr_fast.evaluation.postprocess import postprocess
from detr_fast.model.detr import DETR
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.recording import CudaRecorder, Recordings
from detr_fast.runtime import Runtime
from detr_fast.stages import stage

IMAGE_ID, X, Y, WIDTH, HEIGHT, SCORE, CATEGORY_ID = range(7)
"""Columns of the rows (N, 7) float64; boxes are in pixels of the original image."""
NAMED_AT_MOST = 10
MOST_RECORDINGS = 32
SMALL_BATCH_PX = 4_000_000
"""Pixels that a GPU takes as long for as the host for launching the forward pass, about 5 ms: four images of 800x1066.
Such batches gain from a CUDA graph, larger ones little."""
UNCAPTURED_CALLS = {"small": 1, "large": 3}
"""Of a shape, before it is captured, which costs as much as some forward passes (0.1 s)."""


# no_grad and not inference_mode: what a module might cache here must stay usable in training
@torch.no_grad()
def collect_detections(
    model: DETR, batches: Iterable[Batch], runtime: Runtime, categories: Sequence[Category] | None
) -> np.ndarray:
    """Return all queries of all images as rows (N, 7) float64, those of every process joined, no image twice, in
    ascending order of image ids, whatever the batches and processes.

    `categories` says which category id a label stands for; without them labels are ids. The device is not waited for
    between batches. Raises UserError for an output that is not finite, with the images' ids.
    """
    image_ids: list[int] = []
    parts: list[Tensor] = []
    forward = forward_of(model, runtime)
    with evaluation_mode(model):
        for batch in batches:
            found = detect_batch(forward, batch.to(runtime.device), model, runtime)
            parts.append(row_values(*found))
            image_ids += batch.image_ids
    rows = gather_rows(join_rows(image_ids, parts, model.config.num_queries))
    rows = rows[np.argsort(rows[:, IMAGE_ID], kind="stable")]
    require_finite(rows)
    if categories is not None:
        rows[:, CATEGORY_ID] = category_ids(rows[:, CATEGORY_ID], categories)
    return rows


def forward_of(model: DETR, runtime: Runtime) -> Any:
    """What is called in the model's place: its compiled form where that is asked for, and on a GPU, where it is frozen,
    its recorded one.

    Not both: a compiled model may compile anew at any call, which no recording could hold. The model itself stays what
    hooks, profilers and exports need: a replay runs no Python.
    """
    if runtime.compile:
        return torch.compile(model)
    if runtime.capture is False:
        return model
    if model.frozen and runtime.device.type == "cuda" and model.recordings is None:
        model.recordings = Recordings(CudaRecorder(runtime.device), MOST_RECORDINGS)
    return model if model.recordings is None else functools.partial(replayed, model)


def replayed(model: DETR, images: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Computes `pred_logits` and `pred_boxes` as the model does, from its graph cache.

    A small batch's shape is captured at its second call, a large one's at its fourth. A later call leaves the results
    as they are.
    """
    assert model.recordings is not None

    def last_layer(given: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        outputs = model(*given)
        return {name: outputs[name] for name in ("pred_logits", "pred_boxes")}

    batch, _, height, width = images.shape
    size = "small" if batch * height * width <= SMALL_BATCH_PX else "large"
    return model.recordings(last_layer, (images, mask), UNCAPTURED_CALLS[size])


def detect_batch(forward: Any, batch: Batch, model: DETR, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, Q), labels (B, Q) and boxes xyxy (B, Q, 4) in pixels of the original images, on the device.

    `forward` is `model`, or another form of it; `batch` is on the device.
    """
    config, backend = model.config, model.backend("preprocessing")
    with stage("pixels"):
        images, mask = model_input(
            batch, config.image_mean, config.image_std, runtime.channels_last, runtime.dtype, backend
        )
    with stage("forward"), runtime.autocast():
        logits, boxes = forward_in_parts(forward, images, mask, batch.image_ids)
    with stage("postprocess"):
        return postprocess(logits, boxes, batch.original_sizes)


def row_values(scores: Tensor, labels: Tensor, boxes_xyxy_px: Tensor) -> Tensor:
    """(B, Q, 6): x, y, width, height, score, label."""
    low, high = boxes_xyxy_px.split(2, dim=-1)
    return torch.cat((low, high - low, scores[..., None], labels[..., None]), dim=-1)


@contextmanager
def evaluation_mode(model: DETR) -> Iterator[None]:
    """Without dropout, and as it was before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def forward_in_parts(
    forward: Any, images: Tensor, mask: Tensor | None, image_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Logits and boxes of the last layer. A batch that does not fit into the memory is halved until it does.

    Its padding stays, so that the numbers do not depend on it. Raises UserError where a single image does not fit.
    """
    try:
        outputs = forward(images, mask)
        return outputs["pred_logits"], outputs["pred_boxes"]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(images) == 1:
            height, width = images.shape[-2:]
            raise UserError(
                f"Image {image_ids[0]} ({width}x{height} pixels) does not fit into the device's memory. Give a smaller "
                "--image-size and --max-size."
            ) from error
    half = len(images) // 2
    parts = [
        forward_in_parts(forward, images[part], None if mask is None else mask[part], image_ids[part])
        for part in (slice(None, half), slice(half, None))
    ]
    logits, boxes = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(boxes)


def join_rows(image_ids: Sequence[int], parts: Sequence[Tensor], queries: int) -> np.ndarray:
    """Rows (N, 7) float64 of batches (B, Q, 6), which leave the device here, all at once."""
    if not parts:
        return np.zeros((0, 7))
    values = torch.cat(list(parts)).flatten(0, 1).double().cpu().numpy()
    return np.column_stack((np.repeat(np.asarray(image_ids, dtype=np.float64), queries), values))


def require_finite(rows: np.ndarray) -> None:
    """Raises UserError for NaN or infinity: COCO's evaluator would report an AP of 1.0 for NaN scores."""
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        images = [str(int(image)) for image in np.unique(rows[broken, IMAGE_ID])]
        more = f" and {len(images) - NAMED_AT_MOST} more" if len(images) > NAMED_AT_MOST else ""
        raise UserError(
            f"The model's scores or boxes are not finite for image {', '.join(images[:NAMED_AT_MOST])}{more}. The "
            "weights hold NaN, or values overflowed: use an earlier checkpoint, or --precision fp32."
        )


def category_ids(labels: np.ndarray, categories: Sequence[Category]) -> np.ndarray:
    """The category id of each label. Raises UserError for a label that stands for none."""
    ids = np.array([category.id for category in categories], dtype=np.float64)
    largest = int(labels.max(initial=-1))
    if largest >= len(ids):
        raise UserError(
            f"The model predicts class {largest}, but the data has {len(ids)} classes (0 to {len(ids) - 1}). It was "
            "trained on other classes: evaluate it on their data."
        )
    return ids[labels.astype(np.int64)]


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, on every one of them."""
    if not dist.is_initialized():
        return rows
    shares: list[np.ndarray] = [rows] * dist.get_world_size()
    dist.all_gather_object(shares, rows)
    return np.concatenate(shares)
