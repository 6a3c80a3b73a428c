"""From single images to batches on the device: one worker's read, the collation, the two loaders, the normalisation."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from detr_kernels import Backend, PackedImages, normalize_pad
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_fast.config import UserError
from detr_fast.data.coco import CocoDataset
from detr_fast.data.sample import Sample
from detr_fast.data.sampler import EpochSampler, Position
from detr_fast.data.targets import Targets

WORKER_TIMEOUT_S = 600
"""Longer than any batch takes to read: past it a worker hangs."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step, padded right and below to the largest."""

    images: Tensor
    """uint8 (B, 3, H, W), 0 where padded"""
    sizes: Tensor
    """(B, 2) int64, each image's (h, w) inside"""
    padded: bool
    """Whether any image is smaller than (H, W); known without asking the device."""
    targets: Targets
    image_ids: list[int]
    original_sizes: Tensor
    """(B, 2) int64, (h, w) of the files"""
    skipped: tuple[str, ...] = ()
    """Paths of images that were to be read here and could not be, with --on-bad-image skip."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            original_sizes=self.original_sizes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """In page-locked memory, from which copies to a GPU do not block; the DataLoader calls it by this name."""
        targets = (self.targets.labels, self.targets.boxes_cxcywh, self.targets.count)
        return replace(
            self,
            images=self.images.pin_memory(),
            sizes=self.sizes.pin_memory(),
            targets=Targets(*(part.pin_memory() for part in targets)),
            original_sizes=self.original_sizes.pin_memory(),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """At least one sample; images in channels-last memory."""
    sizes = torch.tensor([sample.image.shape[1:] for sample in samples])
    height, width = sizes.amax(dim=0).tolist()
    padded = bool((sizes != sizes[0]).any())
    allocate = torch.zeros if padded else torch.empty
    images = allocate(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for row, sample in zip(images, samples, strict=True):
        row[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    return Batch(
        images=images,
        sizes=sizes,
        padded=padded,
        targets=Targets.from_list([{"labels": s.labels, "boxes": s.boxes_cxcywh} for s in samples]),
        image_ids=[sample.image_id for sample in samples],
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
    )


def normalize(
    batch: Batch,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    channels_last: bool,
    dtype: torch.dtype = torch.float32,
    form: Backend = "ref",
) -> tuple[Tensor, Tensor | None]:
    """`(x / 255 - mean) / std` as `dtype` (B, 3, H, W), 0 where padded, and the mask (B, H, W), True where padded.

    The mask is None where nothing is. Runs on the batch's device and asks it for nothing.
    """
    height, width = batch.images.shape[2:]
    packed = PackedImages.of_padded(batch.images, batch.sizes)
    images, sizes = normalize_pad(packed, height, width, mean, std, dtype, form)
    if not channels_last:
        images = images.contiguous()
    if not batch.padded:
        return images, None
    rows = torch.arange(height, device=images.device)[None, :, None]
    columns = torch.arange(width, device=images.device)[None, None, :]
    return images, (rows >= sizes[:, 0, None, None]) | (columns >= sizes[:, 1, None, None])


@dataclass(frozen=True, eq=False)
class Read:
    """What reading one position gave. Errors travel as values, since the DataLoader would wrap what a worker raises."""

    sample: Sample | None
    skipped: tuple[str, ...] = ()
    error: UserError | None = None


class TrainReader(Dataset[Read]):
    """Reads `dataset` by (epoch, index); with "skip", the next good image stands in for one that cannot be read."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, position: Position) -> Read:
        epoch, index = position
        skipped: list[str] = []
        for offset in range(len(self.dataset)):
            place = (index + offset) % len(self.dataset)
            try:
                return Read(self.dataset[epoch, place], tuple(skipped))
            except UserError as error:
                if self.dataset.on_bad_image == "error":
                    return Read(None, error=error)
                skipped.append(str(self.dataset.records[place].path))
        return Read(None, error=UserError(f"None of the {len(self.dataset)} training images can be read."))


class EvaluationReader(Dataset[Read]):
    """Reads `dataset` by index; with "skip", an image that cannot be read is left out: a stand-in would count twice."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Read:
        try:
            return Read(self.dataset[0, index])
        except UserError as error:
            if self.dataset.on_bad_image == "error":
                return Read(None, error=error)
            return Read(None, skipped=(str(self.dataset.records[index].path),))


Collated = Batch | UserError | tuple[str, ...]
"""A batch, or the error, or the skipped paths where there is no image left for a batch."""


def collate_reads(reads: Sequence[Read]) -> Collated:
    for read in reads:
        if read.error is not None:
            return read.error
    skipped = tuple(path for read in reads for path in read.skipped)
    samples = [read.sample for read in reads if read.sample is not None]
    return replace(collate(samples), skipped=skipped) if samples else skipped


def train_loader(
    dataset: CocoDataset,
    batch_size: int,
    workers: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    start_epoch: int = 0,
    start_batch: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches without end, in the order of `EpochSampler`, the same for any number of `workers`.

    Raises UserError for an image that cannot be read or a worker that dies or hangs.
    """
    sampler = EpochSampler(len(dataset), batch_size, seed, rank, world, start_epoch, start_batch)
    return batches(make_loader(TrainReader(dataset), workers, pin_memory, batch_sampler=sampler))


def evaluation_loader(
    dataset: CocoDataset, batch_size: int, workers: int, pin_memory: bool = False, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Every image once, in order; of several ranks, each takes every `world`-th. Raises as `train_loader`."""
    indices = range(rank, len(dataset), world)
    loader = make_loader(EvaluationReader(dataset), workers, pin_memory, batch_size=batch_size, sampler=indices)
    return batches(loader)


def make_loader(dataset: Dataset[Read], workers: int, pin_memory: bool, **order: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate_reads,
        timeout=WORKER_TIMEOUT_S if workers else 0,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # or making an iterator would draw from the global one, and a resumed run differ
        **order,
    )


def batches(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches, with errors raised in this process."""
    skipped: tuple[str, ...] = ()
    for collated in surviving(loader):
        if isinstance(collated, UserError):
            raise collated
        if isinstance(collated, Batch):
            yield replace(collated, skipped=skipped + collated.skipped)
            skipped = ()
        else:
            skipped += collated
    if skipped:
        warnings.warn(f"Images that could not be read, at the end: {', '.join(skipped)}")


def surviving(loader: DataLoader) -> Iterator[Collated]:
    """The loader's items. Raises UserError with a hint where a worker was killed or hangs."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise UserError(
            f"{error} If memory ran out, lower --workers or --batch-size; in a container, give more /dev/shm."
        ) from error
