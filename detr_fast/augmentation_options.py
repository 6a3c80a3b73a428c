"""Options of `train` that say how training images are augmented and arranged in batches."""

from dataclasses import dataclass
from typing import ClassVar

from detr_fast.config import require
from detr_fast.option_groups import Idle, Options

COMPOSING = "--mosaic, --mixup and --copy-paste"


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """Sample crops and sizes anew in each epoch, and arrange images in batches."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("crop_range", lambda o: not o.crop_sizes, "without --crop-sizes: give them too"),
        Idle(
            "min_visible",
            lambda o: not o.crop_sizes and not o.composes,
            f"without --crop-sizes, {COMPOSING}: give one of them",
        ),
        Idle("compose_epochs", lambda o: not o.composes, f"without {COMPOSING}: give one of them"),
    )
    train_sizes: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter sides to draw from, in pixels."""
    crop_sizes: tuple[int, ...] = (400, 500, 600)
    """Shorter sides to draw from before a random crop, in half of the images; empty: no crops."""
    crop_range: tuple[int, int] = (384, 600)
    """Smallest and largest side of that crop, in pixels."""
    min_visible: float = 0.0
    """Drop an object of whose box a crop leaves less than this fraction; 0: DETR's, any sliver is kept."""
    color_jitter: float = 0.0
    """Strength, 0 to 1, of random brightness, contrast, saturation and channel gains; 0: DETR's, none."""
    mosaic: float = 0.0
    """Fraction of the samples that are four images' parts; likewise the next two. 0: DETR's, none."""
    mixup: float = 0.0
    """Fraction with another image half transparent over it."""
    copy_paste: float = 0.0
    """Fraction with one to three objects of other images pasted in."""
    compose_epochs: tuple[int, int] | None = None
    """Epochs, counted from 0, in which these three are on: from the first, before the second. Default: all but the
    first twentieth and the last fifth of --epochs; with --minutes, which has no such number, it has to be given."""
    buckets: bool = True
    """Batches of images of like shape, so that little is padding; without, of any."""

    def __post_init__(self) -> None:
        require(len(self.train_sizes) > 0 and min(self.train_sizes) > 0, "--train-sizes needs positive sizes.")
        require(min(self.crop_sizes, default=1) > 0, "--crop-sizes needs positive sizes.")
        low, high = self.crop_range
        require(0 < low <= high, f"--crop-range {low} {high}: the smaller side comes first.")
        begin, end = self.compose_epochs or (0, 1)
        require(0 <= begin < end, f"--compose-epochs {begin} {end}: the first epoch comes first, and 0 is the least.")

    @property
    def composes(self) -> bool:
        """Tell whether samples may be composed of several images."""
        return max(self.mosaic, self.mixup, self.copy_paste) > 0
