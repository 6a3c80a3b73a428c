"""The order of training: endless, known from the seed alone, and to be entered at any batch of any epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from detr_fast.config import require

Position = tuple[int, int]
"""(epoch, index of the image)"""


class EpochSampler(Sampler[list[Position]]):
    """Batches of (epoch, index) without end.

    Batch k of an epoch is a slice of a permutation drawn from (seed, epoch), of which each of `world` ranks takes its
    part, so the ranks together see the same images whatever their number, as long as `batch_size` times `world` stays.
    The rest of an epoch that fills no batch is left out.
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
    ) -> None:
        """`batch_size` is one rank's. Raises UserError where `length` images do not fill one batch of all ranks."""
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.global_batch_size = batch_size * world
        self.start_epoch = start_epoch
        self.start_batch = start_batch
        require(
            length >= self.global_batch_size,
            f"The training set has {length} images, fewer than one batch of {self.global_batch_size} "
            f"({batch_size} on each of {world} devices): lower --batch-size.",
        )

    @property
    def batches_per_epoch(self) -> int:
        return self.length // self.global_batch_size

    def __iter__(self) -> Iterator[list[Position]]:
        epoch, batch = self.start_epoch, self.start_batch
        while True:
            order = self._order(epoch)
            for number in range(batch, self.batches_per_epoch):
                start = number * self.global_batch_size + self.rank * self.batch_size
                yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]
            epoch, batch = epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        return random_generator(self.seed, epoch).permutation(self.length)


def random_generator(seed: int, epoch: int, index: int = -1) -> np.random.Generator:
    """For the augmentation of image `index` in `epoch`; without `index`, for the epoch's order."""
    # counted from 1, since a trailing 0 would not change the stream and image 0 would share the order's
    return np.random.default_rng((seed % 2**64, epoch, index + 1))
