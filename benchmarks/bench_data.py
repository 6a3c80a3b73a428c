"""Times the way from JPEG files to what a model takes, in one process: `pytest benchmarks/bench_data.py
--benchmark-only`; and the order of training, of 1, 8 and 64 processes (`-k order`).

Two stages: read, which is what ours leaves to worker processes; and batch, which is all, resized by the recipe,
normalised and padded. Ours against Pillow and torchvision as facebookresearch has them, on the embedded data set and on
photographs of 640x480 pixels. Both draw the same sizes and crops. Ours must leave the boxes and, but for the rounding
to whole levels, the pixels of a pipeline that never rounds and, as ours, resizes once where there is a crop.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detr_profiling.comparison.closeness import assert_close
from detr_profiling.mixed_sizes import coco_sizes
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchvision.transforms import functional as F

from benchmarks.clock import Size, Verdict, time_case
from benchmarks.photographs import PHOTOGRAPHS
from benchmarks.pillow_pipeline import MEAN, STD, OnePass, PaddedBatch, PillowPipeline
from detr_fast.data.batch import Sample, collate
from detr_fast.data.buckets import Buckets
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.sampler import BATCHES_A_GROUP, EpochSampler, Group, Position
from detr_fast.options import TrainOptions
from detr_fast.preprocessing import Preprocessing
from detr_fast.training.recipes import RECIPES

CPU = torch.device("cpu")
BATCH_SIZE = 16
SIZES_OF = partial(coco_sizes, 42)
PRECISIONS = {"read": "uint8", "batch": "fp32"}
TOLERANCES = {"pixels uint8": 1.0, "pixels fp32": 1 / 255 / min(STD), "mask": 0.0, "boxes": 1e-6}
"""Absolute tolerances: for pixels one level of 255, in the stage's unit (0 to 255, or normalised); for boxes, which are
relative to the image, the rounding of float32."""


class OurPipeline:
    """Does what a training run's workers do, and its step's normalisation, which is on the device there."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def read(self) -> list[Sample]:
        augmentations = self.dataset.augmentations(0, range(len(self.dataset)))
        return [self.dataset.read(index, augmentation) for index, augmentation in enumerate(augmentations)]

    def batch(self) -> PaddedBatch:
        samples = self.read()
        images, mask = Preprocessing(MEAN, STD, channels_last=True)(collate(samples))
        return PaddedBatch(images, mask, [sample.boxes_cxcywh for sample in samples])


@dataclass(frozen=True)
class DataCase:
    """A stage of a pipeline, `ours` or `pillow`, over a small data set."""

    stage: str
    pipeline: str
    data: str
    """The fixture that makes it."""
    size: str
    """HEIGHTxWIDTH of the image files, in pixels."""
    images: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.pipeline}"

    @property
    def precision(self) -> str:
        return PRECISIONS[self.stage]

    @property
    def group(self) -> str:
        return f"data: {self.stage}, {self.size}, b{self.images}"


def cases(size: Size) -> Iterator[DataCase]:
    for data, height_width, images in (("shapes_root", "64x64", 64), ("photographs_root", "480x640", PHOTOGRAPHS)):
        for stage in PRECISIONS:
            for pipeline in ("ours", "pillow"):
                yield DataCase(stage, pipeline, data, height_width, images)


def bench_data(benchmark: BenchmarkFixture, case: DataCase, request: Any) -> None:
    root: Path = request.getfixturevalue(case.data)
    recipe = RECIPES["tiny"] if case.data == "shapes_root" else TrainOptions()
    dataset = build_dataset(recipe.but(data=str(root)), "train")
    assert len(dataset) == case.images
    is_ours = case.pipeline == "ours"
    plain = OnePass if is_ours else PillowPipeline
    timed = OurPipeline(dataset) if is_ours else PillowPipeline(dataset)
    run, run_plain, run_exact = (
        getattr(pipeline, case.stage) for pipeline in (timed, plain(dataset), plain(dataset, exact=True))
    )
    time_case(benchmark, case, judge(run(), run_exact(), run_plain(), case.precision), run, CPU)


@dataclass(frozen=True)
class OrderCase:
    """The order of a group's batches, for one of `processes` that train together, each with `BATCH_SIZE` images."""

    processes: int
    precision: str = "fp64"
    size: str = "800x1333"
    """At most, of an image."""

    @property
    def name(self) -> str:
        return f"order-of-{self.processes}"

    @property
    def images(self) -> int:
        return BATCHES_A_GROUP * BATCH_SIZE * self.processes

    @property
    def group(self) -> str:
        return f"data: order of {BATCHES_A_GROUP} batches, {self.processes} x b{BATCH_SIZE}"


def order_cases(size: Size) -> Iterator[OrderCase]:
    yield from map(OrderCase, (1, 8, 64))


def bench_order(benchmark: BenchmarkFixture, order_case: OrderCase) -> None:
    """Time what a thread beside the steps does, a whole group; note a step's part in the launching thread."""
    sampler = EpochSampler(
        4 * order_case.images, BATCH_SIZE, 42, world=order_case.processes, buckets=Buckets(SIZES_OF, 64)
    )
    groups, batches = sampler.groups(), iter(sampler)
    verdict = judge_order(next(groups), batches)
    time_case(benchmark, order_case, verdict, lambda: next(groups), CPU)
    began = time.thread_time()
    for _ in itertools.islice(batches, 2 * BATCHES_A_GROUP):
        pass
    benchmark.extra_info["launching_thread_us_a_step"] = 1e6 * (time.thread_time() - began) / (2 * BATCHES_A_GROUP)


def judge_order(group: Group, batches: Iterator[list[Position]]) -> Verdict:
    """Hold batches to their group: its images, in padded sizes that they fit into. Raises AssertionError."""
    for images, padded_size, batch in zip(group.images[:20], group.padded_sizes.tolist(), batches, strict=False):
        assert [(position.image, list(position.padded_size)) for position in batch] == [
            (image, padded_size) for image in images
        ]
        assert all((SIZES_OF(group.epoch, [image])[0] <= padded_size).all() for image in images)
    return Verdict("padded sizes", 0, 0)


def judge(found: Any, exact: Any, pillow: Any, precision: str) -> Verdict:
    """Compare each image's pixels, and of a batch mask and boxes, with those that were never rounded.

    Raises AssertionError where `found` is further off than twice Pillow's error and one level of 255 allow.
    """
    judged = []
    for (name, result), (_, reference), (_, plain) in zip(*map(quantities, (found, exact, pillow)), strict=True):
        tolerance = TOLERANCES[f"pixels {precision}" if name == "pixels" else name]
        judged.append((name, assert_close(result, reference, plain, tolerance, name)))
    name, worst = max(judged, key=lambda pair: pair[1].error / (pair[1].allowed or 1))
    return Verdict(name, worst.error, worst.allowed)


def quantities(result: PaddedBatch | Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of a batch, or the pixels (3, h, w) of each image of an earlier stage."""
    if isinstance(result, PaddedBatch):
        yield "pixels", result.images
        yield "mask", torch.zeros_like(result.images[:, 0]) if result.mask is None else result.mask.float()
        yield from (("boxes", boxes) for boxes in result.boxes_cxcywh)
        return
    for each in result:
        image = getattr(each, "image", each)
        yield "pixels", F.pil_to_tensor(image) if isinstance(image, Image.Image) else image
