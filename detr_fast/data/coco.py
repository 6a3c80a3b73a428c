"""A data set in COCO format: images read from a folder, labels and boxes from a json."""

import os
import warnings
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from detr_fast.config import ModelConfig, UserError, model_config, require
from detr_fast.data.annotations import Annotations, Category, read_annotations
from detr_fast.data.batch import Sample
from detr_fast.data.categories import choose_categories, label_map
from detr_fast.data.composition import Composition, Part, composed, composition_of
from detr_fast.data.decode import Decoded, decode_file
from detr_fast.data.draws import Draws
from detr_fast.data.duplicates import files_listed_twice, find_duplicates
from detr_fast.data.file_names import ImageFolder, OutsideError
from detr_fast.data.headers import read_header
from detr_fast.data.splits import find_split, require_split
from detr_fast.data.transforms import (
    EvaluationTransform,
    SampledAugmentation,
    SampledAugmentations,
    TrainTransform,
    Transform,
    boxes_within,
)
from detr_fast.options import AugmentationOptions, DataOptions, TrainOptions

__all__ = ["Category", "CocoDataset", "ImageRecord", "build_dataset", "find_split"]


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """An image and what is to be found on it, crowds left out."""

    id: int
    path: Path
    width: int
    height: int
    labels: np.ndarray
    """(T,) int64"""
    boxes_xyxy_px: np.ndarray
    """(T, 4) float32, clamped to the image"""
    absent: str = ""
    """Why there was no such file, and what to do; empty where there was one."""

    def decode(self, draft_scale: int = 1) -> Decoded:
        """Read the file as `decode_file` does. Raises UserError, which for a missing file names similar ones."""
        require(not self.absent or os.path.exists(self.path), f"{self.path}: {self.absent}")
        return decode_file(self.path, draft_scale)


class CocoDataset(Dataset[Sample]):
    """Samples by (epoch, index), in ascending order of image ids; images without targets are among them."""

    def __init__(
        self,
        images_folder: Path,
        annotation_file: Path,
        transform: Transform,
        *,
        seed: int = 0,
        categories: Sequence[Category] | None = None,
        raw_ids: bool = False,
        num_classes: int | None = None,
        on_bad_image: Literal["error", "skip"] = "error",
        follow_links: bool = False,
        min_visible: float = 0.0,
        composition: Composition | None = None,
    ) -> None:
        """Read the annotations, and find the images.

        Labels are indices in `categories`, or in the file's own ascending order of ids; or with `raw_ids`, or where
        `num_classes` is larger than all ids, the ids themselves. `min_visible`: the least fraction of an object's box
        that a crop leaves, if the object is to be kept. `composition`: which samples have other images' parts.

        Raises UserError for a file that is not as COCO's, a category that `categories` lacks, or an image
        outside the folder, to which with `follow_links` a symbolic link may lead. What is mended instead
        is in `annotations.corrections`.
        """
        self.annotation_file = annotation_file
        self.annotations = read_annotations(annotation_file)
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.min_visible = min_visible
        self.composition = composition
        self.categories = choose_categories(self.annotations, categories, raw_ids, num_classes)
        """The category of each label, in label order; None: labels are the ids."""
        self.label_of = label_map(self.annotations, self.categories)
        """Category id to label."""
        self.num_classes = max(self.label_of.values()) + 1 if self.categories is None else len(self.categories)
        folder = ImageFolder(images_folder, follow_links)
        self.records = make_records(self.annotations, folder, self.label_of)
        self.respelled = folder.respelled
        """Names of the json to those of the files that were found for them, where the two differ."""
        self.sizes = np.array([(record.height, record.width) for record in self.records]).reshape(-1, 2)
        """(N, 2), (h, w) of the files in pixels"""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Read the sample `key`, (epoch, index); augmentation and composition are drawn from these and the seed alone.

        Raises UserError for an image that is missing, cannot be decoded, or has another size than the annotations say.
        """
        own = self.augmentation(*key)
        parts = self.parts(*key, own)
        return self.joined(parts, [self.read(part.image, part.augmentation) for part in parts], own)

    def parts(self, epoch: int, index: int, own: SampledAugmentation, unreadable: Container[int] = ()) -> list[Part]:
        """Sample the parts of a sample with the augmentation `own`: of several images, or its own alone.

        For other images that are `unreadable` the next ones stand in.
        """
        alone = Part(index, own)
        if self.composition is None or epoch not in self.composition.epochs:
            return [alone]
        return self.composition.parts(alone, Draws(self.seed, epoch, [index]), self.records, unreadable)

    def joined(self, parts: Sequence[Part], read: Sequence[Sample], own: SampledAugmentation) -> Sample:
        """Join the parts of a sample, each `read` as one."""
        if len(parts) == 1 and parts[0].augmentation == own:
            return read[0]
        return composed(parts, read, own, self.min_visible)

    def read(self, index: int, augmentation: SampledAugmentation) -> Sample:
        """Read an image, cropped as `augmentation` says. Raises UserError as `[]` does."""
        record = self.records[index]
        decoded = record.decode(augmentation.draft_scale())
        if decoded.size != (record.height, record.width):
            raise UserError(size_mismatch(record, decoded.size))
        top, left, bottom, right = crop_box = augmentation.on_grid(decoded.draft_scale)
        boxes, labels = boxes_within(
            torch.from_numpy(record.boxes_xyxy_px) / decoded.draft_scale,
            torch.from_numpy(record.labels),
            crop_box,
            augmentation.hflip,
            self.min_visible,
        )
        image = decoded.image[:, top:bottom, left:right]
        sampled = augmentation.size, augmentation.hflip, augmentation.color
        return Sample(image, labels, boxes, record.id, decoded.size, *sampled)

    def augmentations(self, epoch: int, images: np.ndarray | Sequence[int]) -> SampledAugmentations:
        """Sample the augmentations of images, (N,) indices, in an epoch; nothing is read for it."""
        return self.transform(self.sizes[images], Draws(self.seed, epoch, images))

    def augmentation(self, epoch: int, index: int) -> SampledAugmentation:
        """Sample the augmentation of one image."""
        (augmentation,) = self.augmentations(epoch, [index])
        return augmentation

    def coco_document(self) -> dict[str, Any]:
        """Return the cleaned annotations as a COCO dict, crowds included, with the file's own category ids."""
        return self.annotations.document()

    def silent_faults(self) -> Iterator[str]:
        """Yield a line for each kind of fault that neither reading nor training would notice."""
        yield from self.annotations.corrections.doubtful_formats()
        yield from find_duplicates(self.annotations).problems()
        ids, files = [record.id for record in self.records], [record.path for record in self.records]
        yield from files_listed_twice(ids, files)

    def absent_images(self, shown: int = 3) -> str | None:
        """Say how many images have no file, and of the first `shown` why; None where all have one."""
        absent = [record for record in self.records if record.absent]
        if not absent:
            return None
        first = "\n".join(f"  {record.path}: {record.absent}" for record in absent[:shown])
        return f"{self.annotation_file}: {len(absent)} of {len(self)} images have no file. The first:\n{first}"


SKIPPING = "Or go on without it: --on-bad-image skip."
"""Advice that commands with the option add to the fault of an image."""


def size_mismatch(record: ImageRecord, file_size: tuple[int, int]) -> str:
    height, width = file_size
    header = read_header(record.path)
    exif = "EXIF rotation is not applied"
    if header and header.turned:
        exif += f", and the file has orientation {header.orientation}: other programs show it in another way"
    return (
        f"{record.path}: is {width} x {height}, but the annotations say {record.width} x {record.height} "
        f"({exif}). Correct one of them."
    )


def make_records(annotations: Annotations, folder: ImageFolder, label_of: dict[int, int]) -> list[ImageRecord]:
    """Make a record for each image. Raises UserError for a file name that leads out of `folder`."""
    trained_on = np.flatnonzero(~annotations.crowd)
    rows = trained_on[np.argsort(annotations.image_ids[trained_on], kind="stable")]
    image_ids = [image.id for image in annotations.images]
    starts = np.searchsorted(annotations.image_ids[rows], image_ids, side="left")
    ends = np.searchsorted(annotations.image_ids[rows], image_ids, side="right")
    labels = np.array([label_of[id_] for id_ in annotations.category_ids[rows].tolist()], dtype=np.int64)
    boxes = annotations.boxes_xyxy_px[rows]
    records, refused = [], []
    for image, start, end in zip(annotations.images, starts, ends, strict=True):
        try:
            path, absent = folder.find(image.file_name)
        except OutsideError as error:
            refused.append(f"image {image.id}: 'file_name' {image.file_name!r:.100} {error}")
        else:
            each = image.id, path, image.width, image.height, labels[start:end], boxes[start:end], absent
            records.append(ImageRecord(*each))
    more = f" So it is with {len(refused)} of {len(annotations.images)} images." if len(refused) > 1 else ""
    require(not refused, f"{annotations.file}: {''.join(refused[:1])}{more}")
    return records


def build_dataset(
    options: DataOptions | TrainOptions,
    split: str,
    model: ModelConfig | None = None,
    *,
    categories: Sequence[Category] | None = None,
    raw_ids: bool = False,
) -> CocoDataset:
    """Build the split that `options` lead to, augmented where `options` are a TrainOptions and `split` is train.

    `model` says the image sizes where `options` do not; default: the model that a TrainOptions names, else DETR's.
    `categories`, `raw_ids` and a TrainOptions's `num_classes` as in CocoDataset. Raises UserError as that does, for
    images without a file, and for an image size above the largest.
    """
    training, place = (options, options.dataset) if isinstance(options, TrainOptions) else (None, options)
    folder, file = require_split(place, split)
    if model is None:
        model = model_config(training.network.model) if training else ModelConfig()
    model = replace(model, **place.sizes_given())
    transform: Transform = EvaluationTransform(model.image_size, model.max_size)
    min_visible, composition = 0.0, None
    if training and split == "train":
        drawn = training.augmentation
        min_visible, composition = drawn.min_visible, composition_of(training)
        transform = training_transform(drawn, model.max_size)
    dataset = CocoDataset(
        folder,
        file,
        transform,
        seed=training.seed if training else 0,
        categories=categories,
        raw_ids=raw_ids,
        num_classes=training.network.num_classes if training else None,
        on_bad_image=place.on_bad_image,
        follow_links=place.follow_links,
        min_visible=min_visible,
        composition=composition,
    )
    require_images(dataset)
    for fault in dataset.silent_faults():
        warnings.warn(f"{file}: {fault}.")
    return dataset


def training_transform(options: AugmentationOptions, max_size: int) -> TrainTransform:
    crops = options.crop_sizes, options.crop_range
    return TrainTransform(options.train_sizes, max_size, *crops, options.color_jitter)


def require_images(dataset: CocoDataset) -> None:
    """Raise UserError, before anything is read, where an image has no file, or with "skip" where none has."""
    absent = dataset.absent_images()
    if absent is None:
        return
    some_are_there = any(not record.absent for record in dataset.records)
    advice = "\nGo on without them: --on-bad-image skip." if some_are_there else ""
    require(dataset.on_bad_image == "skip" and some_are_there, f"{absent}{advice}")
    warnings.warn(f"{absent}\nThey are left out.")
