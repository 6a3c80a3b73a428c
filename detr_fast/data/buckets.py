"""Batches of images of like shape, so that little of what is computed is padding."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def shape_order(sizes: np.ndarray, batch_size: int) -> np.ndarray:
    """Return an order (N,) of images of `sizes` (N, 2) in pixels, of which successive batches hold like shapes.

    Sort-tile: strips of like width, each sorted by height and cut into batches (Leutenegger et al. 1997). Images of one
    size stay in the order they come in.
    """
    strip = math.ceil(math.sqrt(len(sizes) / batch_size)) * batch_size
    by_width = np.argsort(sizes[:, 1], kind="stable")
    strips = (by_width[start : start + strip] for start in range(0, len(sizes), strip))
    return np.concatenate([part[np.argsort(sizes[part, 0], kind="stable")] for part in strips])


def shape_batches(sizes: np.ndarray, batch_size: int) -> list[list[int]]:
    """Return the indices of images, resized to `sizes` (N, 2) as for evaluation, each once, as batches of like shape.

    All have then one shorter side or one longer side, so that one sort suffices: from the widest to the tallest. The
    shapes that most batches have come first, so that they are in a graph cache before it is full; of shapes as frequent
    the larger. One batch may be smaller than the others.
    """
    order = np.lexsort((-sizes[:, 1], sizes[:, 0]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shapes = [tuple(sizes[batch].max(0).tolist()) for batch in batches]
    uses = Counter(shapes)
    ranked = sorted(zip(shapes, batches, strict=True), key=lambda pair: (-uses[pair[0]], -math.prod(pair[0]), pair[0]))
    return [batch.tolist() for _, batch in ranked]


@dataclass(frozen=True)
class Buckets:
    """Arranges groups of training images by the shapes that they will have."""

    sizes_of: Callable[[int, np.ndarray], np.ndarray]
    """Epoch and image indices (N,) to the sizes (N, 2), (h, w) in pixels, that the images will have then."""
    step: int = 1
    """Sides of a batch are multiples of this many pixels, so that its shapes are few; the order does not
    depend on it."""

    def arrange(self, epoch: int, group: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `group`, image indices of N whole batches, as (N, batch_size), and the (H, W) of each, (N, 2)."""
        sizes = self.sizes_of(epoch, group)
        order = shape_order(sizes, batch_size)
        largest = sizes[order].reshape(-1, batch_size, 2).max(1)
        return group[order].reshape(-1, batch_size), -(-largest // self.step) * self.step
