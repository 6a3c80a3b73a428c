"""Images of many sizes, as in training on COCO: four batches that represent an epoch's distribution of sizes."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from detr_fast.augmentation_options import AugmentationOptions
from detr_fast.data.buckets import Buckets
from detr_fast.data.draws import Draws
from detr_fast.data.sampler import BATCHES_A_GROUP, EpochSampler, Position
from detr_fast.data.transforms import TrainTransform

COCO_SIZES = {
    **{(480, 640): 38, (427, 640): 22, (640, 480): 12, (640, 427): 8, (426, 640): 6},
    **{(640, 640): 3, (612, 612): 3, (375, 500): 3, (360, 640): 3, (500, 375): 2},
}
"""(h, w) and how many of a hundred photographs have about that size in COCO."""
RECIPE = AugmentationOptions()
LARGEST_PX = max(RECIPE.train_sizes)
TRANSFORM = TrainTransform(RECIPE.train_sizes, 1333, RECIPE.crop_sizes, RECIPE.crop_range)
PHOTOGRAPHS = np.repeat(list(COCO_SIZES), list(COCO_SIZES.values()), axis=0)
"""(100, 2), (h, w) in pixels"""
TYPICAL_BATCHES = 4


def coco_sizes(seed: int, epoch: int, images: np.ndarray | Sequence[int], largest_px: int = LARGEST_PX) -> np.ndarray:
    """Return (h, w) in pixels, (N, 2) int64, of photographs of the mix, (N,) indices, augmented by the paper's recipe,
    scaled so that the largest shorter side is not the recipe's 800 but `largest_px`."""
    sizes = TRANSFORM(PHOTOGRAPHS[np.asarray(images) % len(PHOTOGRAPHS)], Draws(seed, epoch, images)).sizes
    return np.maximum(np.rint(sizes * largest_px / LARGEST_PX), 1).astype(np.int64)


class BatchShape(NamedTuple):
    """Describes one batch, in pixels."""

    sizes: Sequence[tuple[int, int]]
    """(h, w) of each image."""
    padded_size: tuple[int, int]
    """(H, W) that all are padded to."""

    @classmethod
    def of(cls, batch: Sequence[Position], sizes_of: Callable[[int, np.ndarray], np.ndarray]) -> "BatchShape":
        sizes = sizes_of(batch[0].epoch, np.array([position.image for position in batch])).tolist()
        heights, widths = zip(batch[0].padded_size, *sizes, strict=True)
        return cls([(height, width) for height, width in sizes], (max(heights), max(widths)))

    def in_steps(self, step: int) -> "BatchShape":
        """Round the padded size up to multiples of `step` pixels."""
        height, width = (-(-side // step) * step for side in self.padded_size)
        return self._replace(padded_size=(height, width))

    @property
    def computed_px(self) -> int:
        return len(self.sizes) * math.prod(self.padded_size)

    @property
    def image_px(self) -> int:
        return sum(map(math.prod, self.sizes))


def padding(shapes: Iterable[BatchShape]) -> float:
    """Divide the pixels that are computed by those that are images'."""
    computed_px, image_px = zip(*((shape.computed_px, shape.image_px) for shape in shapes), strict=True)
    return sum(computed_px) / sum(image_px)


def order_of(batch_size: int, seed: int, buckets: bool, largest_px: int = LARGEST_PX) -> list[BatchShape]:
    """List a whole group of the sampler's batches, the same images with and without buckets."""
    sizes_of = partial(coco_sizes, seed, largest_px=largest_px)
    arranged = Buckets(sizes_of) if buckets else None
    sampler = EpochSampler(BATCHES_A_GROUP * batch_size, batch_size, seed, buckets=arranged)
    return [BatchShape.of(batch, sizes_of) for batch in itertools.islice(sampler, BATCHES_A_GROUP)]


@cache
def typical_shapes(batch_size: int, seed: int, buckets: bool, largest_px: int) -> list[BatchShape]:
    """Choose from each quarter of an order's batches, by the pixels that they compute, the one nearest to its means.

    So a few batches compute as much for an image as the whole order, and their images are as large: times an image
    compare between orders, although no image may be in both choices. (One set of so few images, once in buckets and
    once shuffled, would not do: it has few extreme shapes, and padding at random comes of those.)
    """
    order = sorted(order_of(batch_size, seed, buckets, largest_px), key=lambda shape: shape.computed_px)
    quarter = len(order) // TYPICAL_BATCHES
    return [most_typical(order[start : start + quarter]) for start in range(0, len(order), quarter)]


def most_typical(shapes: Sequence[BatchShape]) -> BatchShape:
    computed_px, image_px = (
        sum(getattr(shape, name) for shape in shapes) / len(shapes) for name in ("computed_px", "image_px")
    )

    def distance(shape: BatchShape) -> float:
        return abs(shape.computed_px / computed_px - 1) + abs(shape.image_px / image_px - 1)

    return min(shapes, key=distance)
