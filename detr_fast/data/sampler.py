"""The order of training batches: endless, fixed by the seed alone, and enterable at any batch of any epoch."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Sampler

from detr_fast.config import require
from detr_fast.data.buckets import Buckets

T = TypeVar("T")


class Position(NamedTuple):
    """One image of an epoch."""

    epoch: int
    image: int
    """Its index in the data set."""
    padded_size: tuple[int, int] = (1, 1)
    """(H, W) in pixels that its batch is padded to at least."""


class Group(NamedTuple):
    """N successive batches of an epoch, of which `images` holds one rank's part."""

    epoch: int
    images: np.ndarray
    """(N, batch size) indices"""
    padded_sizes: np.ndarray
    """(N, 2), the (H, W) in pixels to pad each batch to at least"""


BATCHES_A_GROUP = 256
"""Batches of like shape are made among the random images of this many batches: enough for little padding, few enough
that an image meets others every epoch."""


def batches_per_epoch(length: int, batch_size: int, world: int) -> int:
    """Return how many batches of `batch_size` each of `world` ranks gets of `length` images.

    Raises UserError where they do not fill one batch of all ranks.
    """
    all_ranks = batch_size * world
    require(
        length >= all_ranks,
        f"The training set has {length} images, fewer than one batch of {all_ranks} ({batch_size} on each of {world} "
        "devices): lower --batch-size.",
    )
    return length // all_ranks


class EpochSampler(Sampler[list[Position]]):
    """Yields batches of positions without end.

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
        """Begin at batch `start_batch` of epoch `start_epoch`; `batch_size` is one rank's.

        Raises UserError as `batches_per_epoch`.
        """
        self.batches_per_epoch = batches_per_epoch(length, batch_size, world)
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.global_batch_size = batch_size * world
        self.start_epoch = start_epoch
        self.start_batch = start_batch
        self.buckets = buckets

    def __iter__(self) -> Iterator[list[Position]]:
        for epoch, images, padded_sizes in one_ahead(self.groups()):
            for batch, (height, width) in zip(images, padded_sizes.tolist(), strict=True):
                yield [Position(epoch, image, (height, width)) for image in batch.tolist()]

    def groups(self) -> Iterator[Group]:
        """Yield this rank's part of `BATCHES_A_GROUP` batches at a time, without end, from `start_batch` on.

        An epoch's last group has fewer.
        """
        first = self.start_batch
        for epoch in itertools.count(self.start_epoch):
            rng = random_generator(self.seed, epoch)
            order = rng.permutation(self.length)[: self.batches_per_epoch * self.global_batch_size]
            turns = rng.random(self.batches_per_epoch)
            for start in range(first - first % BATCHES_A_GROUP, self.batches_per_epoch, BATCHES_A_GROUP):
                end = start + BATCHES_A_GROUP
                group = order[start * self.global_batch_size : end * self.global_batch_size]
                images, padded_sizes = self._arranged(epoch, group, turns[start:end])
                own = images[:, self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                skipped = max(first - start, 0)
                yield Group(epoch, own[skipped:], padded_sizes[skipped:])
            first = 0

    def _arranged(self, epoch: int, group: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Arrange all ranks' batches: image indices (N, global batch size), and the padded size of each (N, 2)."""
        if self.buckets is None:
            batches = group.reshape(-1, self.global_batch_size)
            return batches, np.ones((len(batches), 2), dtype=np.int64)
        batches, padded_sizes = self.buckets.arrange(epoch, group, self.global_batch_size)
        mixed = np.argsort(turns)
        return batches[mixed], padded_sizes[mixed]


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an endless iterator, each made by a thread while the one before is used.

    What goes wrong in the thread is raised here. The thread ends with this iterator, and does not
    outlive the interpreter.
    """
    with ThreadPoolExecutor(1, "one ahead") as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item


def random_generator(seed: int, epoch: int) -> np.random.Generator:
    """Make the generator for the order of an epoch."""
    return np.random.default_rng((seed % 2**64, epoch))
