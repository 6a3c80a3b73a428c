"""Loaders: workers read samples, batches are collated, and copied to the device one ahead."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from detr_fast.config import UserError
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.data.buckets import Buckets, shape_batches
from detr_fast.data.coco import SKIPPING, CocoDataset
from detr_fast.data.sampler import EpochSampler, Position
from detr_fast.data.transforms import SampledAugmentation

WORKER_TIMEOUT_S = 600
"""Longer than any batch takes to read: past it a worker hangs."""


@dataclass(frozen=True, eq=False)
class Read:
    """The result of reading one position. Errors are values, since the DataLoader would wrap what a worker raises."""

    sample: Sample | None
    skipped: tuple[str, ...] = ()
    error: UserError | None = None
    padded_size: tuple[int, int] = (1, 1)
    """(H, W) that the batch is to have at least."""


class TrainReader(Dataset[Read]):
    """Reads `dataset` by (epoch, index); with "skip", the next good image stands in for one that cannot be read."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: Sequence[Position]) -> list[Read]:
        """Read a batch, of one epoch; the DataLoader calls it by this name. All its augmentations are drawn at once."""
        sampled = self.dataset.augmentations(positions[0].epoch, [position.image for position in positions])
        return [self._read(position, one) for position, one in zip(positions, sampled, strict=True)]

    def _read(self, position: Position, augmentation: SampledAugmentation) -> Read:
        """Read a sample; where a part of it cannot be read, sample its parts anew without that image."""
        dataset, index, unreadable = self.dataset, position.image, dict[int, str]()
        while len(unreadable) < len(dataset):
            if index in unreadable:
                index = (index + 1) % len(dataset)
                augmentation = dataset.augmentation(position.epoch, index)
                continue
            parts, read = dataset.parts(position.epoch, index, augmentation, unreadable), list[Sample]()
            try:
                for part in parts:
                    read.append(dataset.read(part.image, part.augmentation))
            except UserError as error:
                if dataset.on_bad_image == "error":
                    return Read(None, error=UserError(f"{error} {SKIPPING}"))
                bad = parts[len(read)].image
                unreadable[bad] = str(dataset.records[bad].path)
            else:
                joined = dataset.joined(parts, read, augmentation)
                return Read(joined, tuple(unreadable.values()), padded_size=position.padded_size)
        return Read(None, error=UserError(f"None of the {len(dataset)} training images can be read."))


class EvaluationReader(Dataset[Read]):
    """Reads `dataset` by index; with "skip", an image that cannot be read is left out: a stand-in would count twice."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> list[Read]:
        """Read a batch; the DataLoader calls it by this name."""
        sampled = self.dataset.augmentations(0, indices)
        return [self._read(index, one) for index, one in zip(indices, sampled, strict=True)]

    def _read(self, index: int, augmentation: SampledAugmentation) -> Read:
        try:
            return Read(self.dataset.read(index, augmentation))
        except UserError as error:
            if self.dataset.on_bad_image == "error":
                return Read(None, error=UserError(f"{error} {SKIPPING}"))
            return Read(None, skipped=(str(self.dataset.records[index].path),))


Collated = Batch | UserError | tuple[str, ...]
"""A batch, or the error, or the skipped paths where there is no image left for a batch."""


def collate_reads(reads: Sequence[Read]) -> Collated:
    """Collate what could be read; of several, the first error."""
    for read in reads:
        if read.error is not None:
            return read.error
    skipped = tuple(path for read in reads for path in read.skipped)
    samples = [read.sample for read in reads if read.sample is not None]
    return replace(collate(samples, reads[0].padded_size), skipped=skipped) if samples else skipped


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
    buckets: Buckets | None = None,
) -> Iterator[Batch]:
    """Yield batches without end, in the order of `EpochSampler`, the same for any number of `workers`.

    Raises UserError for an image that cannot be read or a worker that dies or hangs.
    """
    sampler = EpochSampler(len(dataset), batch_size, seed, rank, world, start_epoch, start_batch, buckets)
    return batches(make_loader(TrainReader(dataset), workers, pin_memory, batch_sampler=sampler))


def evaluation_loader(
    dataset: CocoDataset, batch_size: int, workers: int, pin_memory: bool = False, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Yield every image once, in batches of like shape; each rank takes every `world`-th batch.

    The batches are the same for any number of ranks. Raises UserError as `train_loader` does.

    Sides are not rounded up, as they are in training: nothing is padded then where batches hold one image, or images of
    one size, and so the numbers are those of `predict`.
    """
    by_shape = shape_batches(dataset.augmentations(0, range(len(dataset))).sizes, batch_size)
    return batches(make_loader(EvaluationReader(dataset), workers, pin_memory, batch_sampler=by_shape[rank::world]))


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
    """Yield the loader's batches, with errors raised in this process."""
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


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`; on a GPU one ahead, copied on a stream of its own while the one before is used."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies: Any = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            copied = batch.to(device), copies.record_event()
        if ahead:
            yield received(*ahead)
        ahead = copied
    if ahead:
        yield received(*ahead)


def received(batch: Batch, copied: "torch.cuda.Event") -> Batch:
    """Let the current stream wait for the copy, and keep the batch's memory until that stream is done with it."""
    current = torch.cuda.current_stream(batch.original_sizes.device)
    current.wait_event(copied)
    for tensor in batch.tensors():
        tensor.record_stream(current)
    return batch


def surviving(loader: DataLoader) -> Iterator[Collated]:
    """Yield the loader's items. Raises UserError with a hint where a worker was killed or hangs."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise UserError(
            f"{error} If memory ran out, lower --workers or --batch-size; in a container, give more /dev/shm."
        ) from error
