"""The order of training: endless, known from the seed alone, and to be entered at any batch of any epoch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from detr_fast.config import require


class Position(NamedTuple):
    """One image of an epoch."""

    epoch: int
    image: int
    """Its index."""
    room: tuple[int, int] = (1, 1)
    """(H, W) in pixels that its batch is padded to at least."""


@dataclass(frozen=True)
class Buckets:
    """Batches of images of like shape, so that little is padding."""

    size_of: Callable[[int, int], tuple[int, int]]
    """(epoch, index) to the (h, w) that the image will have then."""
    step: int = 1
    """Sides of a batch are multiples of this many pixels, so that its shapes are few; the order does not depend on
    it."""

    def arrange(self, epoch: int, group: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
        """`group`, whole batches of image indices, as batches (batch_size,) with the room (H, W) of each.

        Sort-tile: strips of like width, each sorted by height and cut into batches (Leutenegger et al. 1997).
        """
        sizes = np.array([self.size_of(epoch, int(index)) for index in group])
        batches = len(group) // batch_size
        strip = math.ceil(math.sqrt(batches)) * batch_size
        by_width = np.argsort(sizes[:, 1], kind="stable")
        strips = (by_width[start : start + strip] for start in range(0, len(group), strip))
        order = np.concatenate([strip[np.argsort(sizes[strip, 0], kind="stable")] for strip in strips])
        largest = sizes[order].reshape(batches, batch_size, 2).max(1)
        rooms = (-(-largest // self.step) * self.step).tolist()
        return [(part, (room[0], room[1])) for part, room in zip(group[order].reshape(batches, -1), rooms, strict=True)]


BATCHES_A_GROUP = 256
"""From how many batches' images, drawn at random, batches of like shape are made: enough that little is padding, few
enough that an image meets others every epoch."""


class EpochSampler(Sampler[list[Position]]):
    """Batches of positions without end.

    Batch k of an epoch is a slice of a permutation drawn from (seed, epoch), of which each of `world` ranks takes its
    part, so the ranks together see the same images whatever their number, as long as `batch_size` times `world` stays.
    With `buckets` slices of the permutation are first arranged by shape, and then shuffled. The rest of an epoch that
    fills no batch is left out.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_epoch: int = 0,
        start_batch: int = 0,
        buckets: Buckets | None = None,
    ) -> None:
        """`batch_size` is one rank's. Raises UserError where `length` images do not fill one batch of all ranks."""
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.global_batch_size = batch_size * world
        self.start_epoch = start_epoch
        self.start_batch = start_batch
        self.buckets = buckets
        require(
            length >= self.global_batch_size,
            f"The training set has {length} images, fewer than one batch of {self.global_batch_size} "
            f"({batch_size} on each of {world} devices): lower --batch-size.",
        )

    @property
    def batches_per_epoch(self) -> int:
        return self.length // self.global_batch_size

    def __iter__(self) -> Iterator[list[Position]]:
        epoch, first = self.start_epoch, self.start_batch
        while True:
            for indices, room in self._batches(epoch, first):
                own = indices[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                yield [Position(epoch, int(index), room) for index in own]
            epoch, first = epoch + 1, 0

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
        """All ranks' batches of an epoch from number `first` on, with the room of each."""
        rng = random_generator(self.seed, epoch)
        order = rng.permutation(self.length)[: self.batches_per_epoch * self.global_batch_size]
        turns = rng.random(self.batches_per_epoch)
        for start in range(first - first % BATCHES_A_GROUP, self.batches_per_epoch, BATCHES_A_GROUP):
            end = start + BATCHES_A_GROUP
            group = order[start * self.global_batch_size : end * self.global_batch_size]
            yield from self._arranged(epoch, group, turns[start:end])[max(first - start, 0) :]

    def _arranged(self, epoch: int, group: np.ndarray, turns: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
        if self.buckets is None:
            return [(indices, (1, 1)) for indices in group.reshape(-1, self.global_batch_size)]
        arranged = self.buckets.arrange(epoch, group, self.global_batch_size)
        return [arranged[place] for place in np.argsort(turns)]


def random_generator(seed: int, epoch: int, index: int = -1) -> np.random.Generator:
    """For the augmentation of image `index` in `epoch`; without `index`, for the epoch's order."""
    # counted from 1, since a trailing 0 would not change the stream and image 0 would share the order's
    return np.random.default_rng((seed % 2**64, epoch, index + 1))
