"""From single images to batches on the device: one worker's read, the collation, the two loaders."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from detr_kernels import PackedImages
from detr_kernels.pixels import Place
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_fast.config import UserError
from detr_fast.data.buckets import Buckets, shape_batches
from detr_fast.data.coco import SKIPPING, CocoDataset
from detr_fast.data.sample import Sample
from detr_fast.data.sampler import EpochSampler, Position
from detr_fast.data.targets import Targets
from detr_fast.data.transforms import Plan

WORKER_TIMEOUT_S = 600
"""Longer than any batch takes to read: past it a worker hangs."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step as they were read, with what is to become of them: see `detr_fast.preprocessing`."""

    images: PackedImages
    room: tuple[int, int]
    """(H, W) that all are padded to, right and below"""
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
            targets=self.targets.to(device, non_blocking=non_blocking),
            original_sizes=self.original_sizes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Self:
        """In page-locked memory, from which copies to a GPU do not block; the DataLoader calls it by this name."""
        targets = (self.targets.labels, self.targets.boxes_cxcywh, self.targets.count)
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=Targets(*(part.pin_memory() for part in targets)),
            original_sizes=self.original_sizes.pin_memory(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes with the pixels as the only tensor: each is a file in shared memory, for which the
        receiver has to connect to the worker."""
        pixels, *small = self.tensors()
        values = [tensor.numpy() for tensor in small]
        return received_batch, (pixels, values, self.images.places, self.room, self.image_ids, self.skipped)

    def split(self, parts: int) -> list["Batch"]:
        """Its images in up to `parts` batches of like size, each padded as the whole."""
        share = -(-len(self.images) // parts)
        slices = [slice(start, start + share) for start in range(0, len(self.images), share)]
        return [
            replace(
                self,
                images=self.images[some],
                targets=self.targets[some],
                image_ids=self.image_ids[some],
                original_sizes=self.original_sizes[some],
            )
            for some in slices
        ]

    def tensors(self) -> Iterator[Tensor]:
        """All that moves between devices."""
        targets = self.targets
        yield from (self.images.buffer, self.images.table, self.original_sizes)
        yield from (targets.labels, targets.boxes_cxcywh, targets.count)

    @property
    def padded(self) -> bool:
        """Whether any image is smaller than the room."""
        return any(size != self.room for size in self.images.sizes)

    @property
    def padding(self) -> float:
        """Pixels that are computed, over those that are not padding."""
        return len(self.images) * self.room[0] * self.room[1] / sum(h * w for h, w in self.images.sizes)


def received_batch(
    pixels: Tensor,
    values: list[np.ndarray],
    places: tuple[Place, ...],
    room: tuple[int, int],
    image_ids: list[int],
    skipped: tuple[str, ...],
) -> Batch:
    """Put a batch together again, of what `Batch.__reduce__` gives."""
    table, original_sizes, *targets = map(torch.tensor, values)
    return Batch(PackedImages(pixels, table, places), room, Targets(*targets), image_ids, original_sizes, skipped)


def collate(samples: Sequence[Sample], room: tuple[int, int] = (1, 1)) -> Batch:
    """At least one sample; padded to the largest, and to `room` at least."""
    images = PackedImages.of_list(
        [sample.image.permute(1, 2, 0) for sample in samples],
        [sample.size for sample in samples],
        [sample.mirrored for sample in samples],
    )
    heights, widths = zip(room, *images.sizes, strict=True)
    return Batch(
        images=images,
        room=(max(heights), max(widths)),
        targets=Targets.from_list([{"labels": s.labels, "boxes": s.boxes_cxcywh} for s in samples]),
        image_ids=[sample.image_id for sample in samples],
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
    )


@dataclass(frozen=True, eq=False)
class Read:
    """What reading one position gave. Errors travel as values, since the DataLoader would wrap what a worker raises."""

    sample: Sample | None
    skipped: tuple[str, ...] = ()
    error: UserError | None = None
    room: tuple[int, int] = (1, 1)
    """(H, W) that the batch is to have at least."""


class TrainReader(Dataset[Read]):
    """Reads `dataset` by (epoch, index); with "skip", the next good image stands in for one that cannot be read."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: Sequence[Position]) -> list[Read]:
        """Read a batch, of one epoch; the DataLoader calls it by this name. All its images are planned at once."""
        plans = self.dataset.plans(positions[0].epoch, [position.image for position in positions])
        return [self._read(position, plan) for position, plan in zip(positions, plans, strict=True)]

    def _read(self, position: Position, plan: Plan) -> Read:
        skipped: list[str] = []
        for offset in range(len(self.dataset)):
            index = (position.image + offset) % len(self.dataset)
            try:
                sample = self.dataset.read(index, plan) if offset == 0 else self.dataset[position.epoch, index]
                return Read(sample, tuple(skipped), room=position.room)
            except UserError as error:
                if self.dataset.on_bad_image == "error":
                    return Read(None, error=UserError(f"{error} {SKIPPING}"))
                skipped.append(str(self.dataset.records[index].path))
        return Read(None, error=UserError(f"None of the {len(self.dataset)} training images can be read."))


class EvaluationReader(Dataset[Read]):
    """Reads `dataset` by index; with "skip", an image that cannot be read is left out: a stand-in would count twice."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> list[Read]:
        """Read a batch; the DataLoader calls it by this name."""
        return [self._read(index, plan) for index, plan in zip(indices, self.dataset.plans(0, indices), strict=True)]

    def _read(self, index: int, plan: Plan) -> Read:
        try:
            return Read(self.dataset.read(index, plan))
        except UserError as error:
            if self.dataset.on_bad_image == "error":
                return Read(None, error=UserError(f"{error} {SKIPPING}"))
            return Read(None, skipped=(str(self.dataset.records[index].path),))


Collated = Batch | UserError | tuple[str, ...]
"""A batch, or the error, or the skipped paths where there is no image left for a batch."""


def collate_reads(reads: Sequence[Read]) -> Collated:
    for read in reads:
        if read.error is not None:
            return read.error
    skipped = tuple(path for read in reads for path in read.skipped)
    samples = [read.sample for read in reads if read.sample is not None]
    return replace(collate(samples, reads[0].room), skipped=skipped) if samples else skipped


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
    """Batches without end, in the order of `EpochSampler`, the same for any number of `workers`.

    Raises UserError for an image that cannot be read or a worker that dies or hangs.
    """
    sampler = EpochSampler(len(dataset), batch_size, seed, rank, world, start_epoch, start_batch, buckets)
    return batches(make_loader(TrainReader(dataset), workers, pin_memory, batch_sampler=sampler))


def evaluation_loader(
    dataset: CocoDataset, batch_size: int, workers: int, pin_memory: bool = False, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Yield every image once, in batches of like shape, the same for any number of ranks, of which each takes every
    `world`-th batch. Raises as `train_loader`.

    Sides are not rounded up, as they are in training: nothing is padded then where batches hold one image, or images of
    one size, and so the numbers are those of `predict`.
    """
    by_shape = shape_batches(dataset.plans(0, range(len(dataset))).sizes, batch_size)
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


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches there; on a GPU one ahead, copied on a stream of its own while the batch before is computed with."""
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
    """For the current stream, which waits for the copy; the memory is not used again before that stream is done."""
    current = torch.cuda.current_stream(batch.original_sizes.device)
    current.wait_event(copied)
    for tensor in batch.tensors():
        tensor.record_stream(current)
    return batch


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
