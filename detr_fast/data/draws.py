"""Counter-based random numbers: an image's depend on seed, epoch and image alone, not on what is drawn before.

They are those of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"), whose n-th
number is a hash of its start + n * GAMMA: many are drawn in a few passes over arrays. Each epoch has streams of its
own, of some numbers an image each, which begin where NumPy's SeedSequence puts (seed, epoch, stream).
"""

from collections.abc import Sequence
from typing import Self

import numpy as np

NUMBERS_A_STREAM = 8
"""An image's numbers beyond these are of further streams: more of them leave those that there were as they are."""
GAMMA = 0x9E3779B97F4A7C15
"""By which the generator's state grows from one number to the next."""


class Draws:
    """Draws numbers for each of N images; an image's depend on (seed, epoch, image, number) alone."""

    def __init__(self, seed: int, epoch: int, images: np.ndarray | Sequence[int]) -> None:
        """Begin an epoch's streams for `images` (N,), indices in the data set."""
        self._place = seed % 2**64, epoch
        counters = np.asarray(images, dtype=np.uint64) * np.uint64(NUMBERS_A_STREAM) + np.uint64(1)
        self._offsets = counters * np.uint64(GAMMA)

    def __getitem__(self, some: np.ndarray) -> Self:
        """Draw for some of the images only: (M,) indices into the N."""
        part = object.__new__(type(self))
        part._place, part._offsets = self._place, self._offsets[some]
        return part

    def fraction(self, number: int) -> np.ndarray:
        """Draw each image's number `number`, (N,) float64, uniform in [0, 1)."""
        stream, within = divmod(number, NUMBERS_A_STREAM)
        start = np.random.SeedSequence((*self._place, 1 + stream)).generate_state(1, np.uint64)
        bits = start + self._offsets + np.uint64(within * GAMMA % 2**64)
        bits ^= bits >> np.uint64(30)
        bits *= np.uint64(0xBF58476D1CE4E5B9)
        bits ^= bits >> np.uint64(27)
        bits *= np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        return (bits >> np.uint64(11)) * 2.0**-53

    def below(self, number: int, limits: np.ndarray | int) -> np.ndarray:
        """Draw (N,) int64, uniform in [0, limit), with one limit or each image's own (N,), all far below 2**53."""
        return (self.fraction(number) * limits).astype(np.int64)

    def choice(self, number: int, values: Sequence[int]) -> np.ndarray:
        """Draw one of `values` for each image, (N,) int64."""
        return np.array(values, dtype=np.int64)[self.below(number, len(values))]
