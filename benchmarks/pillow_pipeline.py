"""facebookresearch's data pipeline: Pillow decodes and resizes, torchvision makes tensors (datasets/transforms.py).

It draws the same numbers as ours, so that both show the same of each image. Where it crops, it resizes twice;
`OnePass` resizes once, as ours does.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from detr_fast.data.coco import CocoDataset, ImageRecord
from detr_fast.data.draws import Draws
from detr_fast.data.transforms import (
    CROP,
    CROP_SIZE,
    HFLIP,
    LONGEST_SIDE_BEFORE_CROP_PX,
    SIZE,
    TrainTransform,
    random_crops,
    resized_sizes,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Picture = Image.Image | Tensor
"""A Pillow image; in an exact pipeline float64 (3, h, w), 0 to 255, never rounded."""


@dataclass(frozen=True)
class LabelledPicture:
    """Holds one picture and its boxes, (T, 4) in pixels."""

    image: Picture
    boxes_xyxy_px: Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """Holds the input of a model, in the layout that all pipelines are compared in."""

    images: Tensor
    """(B, 3, H, W), normalised, 0 where padded"""
    mask: Tensor | None
    """(B, H, W), True where padded; None: nothing is"""
    boxes_cxcywh: list[Tensor]
    """(T, 4) of each image, relative"""


class PillowPipeline:
    """Reads all records of `dataset`, whose transform must be a TrainTransform.

    `exact`: never rounds; what the pixels of every pipeline are compared with.
    """

    def __init__(self, dataset: CocoDataset, exact: bool = False) -> None:
        assert isinstance(dataset.transform, TrainTransform)
        self.dataset = dataset
        self.transform = dataset.transform
        self.exact = exact

    def read(self) -> list[Picture]:
        return [self.decode(record) for record in self.dataset.records]

    def decode(self, record: ImageRecord) -> Picture:
        image = Image.open(record.path).convert("RGB")
        return F.pil_to_tensor(image).double() if self.exact else image

    def augment(self) -> list[LabelledPicture]:
        return [self.sample(index) for index in range(len(self.dataset))]

    def sample(self, index: int) -> LabelledPicture:
        record, transform = self.dataset.records[index], self.transform
        draws = Draws(self.dataset.seed, 0, [index])
        item = LabelledPicture(self.decode(record), torch.from_numpy(record.boxes_xyxy_px))
        if draws.fraction(HFLIP) < 0.5:
            item = flip(item)
        if transform.crop_sizes and draws.fraction(CROP) < 0.5:
            item = resize(item, draws.choice(CROP_SIZE, transform.crop_sizes).item(), LONGEST_SIDE_BEFORE_CROP_PX)
            corner, size = random_crops(np.array([size_of(item.image)]), transform.crop_range, draws)
            item = crop(item, *corner[0].tolist(), *size[0].tolist())
        return resize(item, draws.choice(SIZE, transform.sizes).item(), transform.max_size)

    def batch(self) -> PaddedBatch:
        """Make a batch of all of the data set's images."""
        images, boxes = zip(*(normalize(item) for item in self.augment()), strict=True)
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        padded = images[0].new_zeros(len(images), 3, height, width)
        mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for row, row_mask, image in zip(padded, mask, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
            row_mask[: image.shape[1], : image.shape[2]] = False
        return PaddedBatch(padded, mask, list(boxes))


class OnePass(PillowPipeline):
    """Makes the same crop of each image, resized at once."""

    def read(self) -> list[Picture]:
        return [self.cropped(index).image for index in range(len(self.dataset))]

    def cropped(self, index: int) -> LabelledPicture:
        record = self.dataset.records[index]
        top, left, bottom, right = self.dataset.augmentation(0, index).on_grid(1)
        item = LabelledPicture(self.decode(record), torch.from_numpy(record.boxes_xyxy_px))
        return crop(item, top, left, bottom - top, right - left)

    def sample(self, index: int) -> LabelledPicture:
        augmentation = self.dataset.augmentation(0, index)
        item = resize_to(self.cropped(index), augmentation.size)
        return flip(item) if augmentation.hflip else item


def size_of(image: Picture) -> tuple[int, int]:
    """Return (h, w)."""
    _, height, width = F.get_dimensions(image)
    return height, width


def flip(item: LabelledPicture) -> LabelledPicture:
    width = size_of(item.image)[1]
    mirrored = item.boxes_xyxy_px[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    return LabelledPicture(F.hflip(item.image), mirrored + torch.tensor([width, 0, width, 0]))


def resize(item: LabelledPicture, shorter: int, longest: int) -> LabelledPicture:
    height, width = resized_sizes(np.array([size_of(item.image)]), shorter, longest)[0].tolist()
    return resize_to(item, (height, width))


def resize_to(item: LabelledPicture, size: tuple[int, int]) -> LabelledPicture:
    height, width = size_of(item.image)
    ratios = torch.tensor([size[1] / width, size[0] / height] * 2)
    return LabelledPicture(F.resize(item.image, list(size), antialias=True), item.boxes_xyxy_px * ratios)


def crop(item: LabelledPicture, top: int, left: int, height: int, width: int) -> LabelledPicture:
    corners = (item.boxes_xyxy_px - torch.tensor([left, top, left, top])).reshape(-1, 2, 2)
    corners = torch.min(corners, torch.tensor([width, height])).clamp(min=0)
    kept = (corners[:, 1] > corners[:, 0]).all(1)
    return LabelledPicture(F.crop(item.image, top, left, height, width), corners[kept].reshape(-1, 4))


def normalize(item: LabelledPicture) -> tuple[Tensor, Tensor]:
    """Return the image as a normalised tensor, and its boxes as cxcywh relative to it."""
    height, width = size_of(item.image)
    pixels = item.image / 255 if isinstance(item.image, Tensor) else F.to_tensor(item.image)
    low, high = (item.boxes_xyxy_px / torch.tensor([width, height, width, height])).split(2, -1)
    return F.normalize(pixels, MEAN, STD), torch.cat(((low + high) / 2, high - low), -1)
