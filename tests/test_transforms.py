"""Augmentation and resizing against DETR's formulas, Pillow's pixels and the pixels that a box encloses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_fast.data.transforms import (
    EvaluationTransform,
    LabelledImage,
    TrainTransform,
    crop,
    flip,
    random_region,
    resize,
    resized_size,
)

DETR_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
DETR_TRAIN = TrainTransform(DETR_SIZES, 1333, (400, 500, 600), (384, 600))


def detr_size(width: int, height: int, size: int, max_size: int) -> tuple[int, int]:
    """(h, w) by the published formulas: the bound rounds the shorter side, which cuts the longer one."""
    if float(max(width, height)) / float(min(width, height)) * size > max_size:
        size = round(max_size * float(min(width, height)) / float(max(width, height)))
    if (width <= height and width == size) or (height <= width and height == size):
        return height, width
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def item_with_box(height: int, width: int, box: tuple[int, int, int, int]) -> LabelledImage:
    """Black, but for the box xyxy, which is white."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = 255
    return LabelledImage(image, torch.tensor([7]), torch.tensor([box], dtype=torch.float32))


def white_box(image: torch.Tensor) -> list[float]:
    """Corners of what is at least half white; pixels (i, i + 1)."""
    rows, columns = torch.nonzero(image[0] > 127, as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000), st.integers(1, 1500))
def test_sizes_are_detrs(width: int, height: int, size: int, max_size: int) -> None:
    expected = detr_size(width, height, size, max_size)
    actual = resized_size((height, width), size, max_size)
    assert min(actual) >= 1
    if min(expected) >= 1:
        assert actual == expected


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (640, 480, 800, (800, 1066)),  # 1066.67 is cut
        (480, 640, 800, (1066, 800)),
        (640, 427, 800, (800, 1199)),
        (640, 360, 800, (750, 1333)),  # the bound: 749.8 is rounded
        (500, 500, 800, (800, 800)),
        (1066, 800, 800, (800, 1066)),
    ],
)
def test_known_sizes(width: int, height: int, size: int, expected: tuple[int, int]) -> None:
    assert resized_size((height, width), size, 1333) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 1200), (1, 2)])
def test_fault_18_extreme_aspects_never_give_zero_size(size: tuple[int, int]) -> None:
    item = LabelledImage(
        torch.full((3, *size), 9, dtype=torch.uint8),
        torch.tensor([1]),
        torch.tensor([[0, 0, size[1], size[0]]], dtype=torch.float32),
    )
    train = TrainTransform((48, 80), 133, (40, 60), (38, 60))
    for seed in range(6):
        changed = train(item, np.random.default_rng(seed))
        assert min(changed.size) >= 1 and max(changed.size) <= 140
        assert changed.image.float().mean() == 9
    assert min(EvaluationTransform(80, 133)(item, np.random.default_rng(0)).size) >= 1


def test_resize_is_pillows_within_a_level() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    for size in ((75, 100), (200, 266), (33, 160)):
        ours = resize(
            LabelledImage(torch.from_numpy(pixels).permute(2, 0, 1), torch.zeros(0), torch.zeros(0, 4)), size
        ).image.permute(1, 2, 0)
        pillows = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
        difference = np.abs(ours.numpy().astype(int) - pillows)
        assert difference.mean() < 0.5 and difference.max() <= 2


def test_resize_to_its_own_size_is_no_work() -> None:
    item = item_with_box(30, 40, (3, 5, 20, 17))
    assert resize(item, (30, 40)) is item


def test_boxes_follow_the_pixels() -> None:
    item = item_with_box(60, 80, (8, 12, 40, 30))
    flipped = flip(item)
    assert white_box(flipped.image) == flipped.boxes_xyxy_px[0].tolist() == [40, 12, 72, 30]
    enlarged = resize(item, (120, 240))
    assert white_box(enlarged.image) == enlarged.boxes_xyxy_px[0].tolist() == [24, 24, 120, 60]
    cropped = crop(item, top=20, left=10, height=35, width=20)
    assert cropped.size == (35, 20)
    assert white_box(cropped.image) == cropped.boxes_xyxy_px[0].tolist() == [0, 0, 20, 10]


def test_boxes_that_a_crop_leaves_empty_go_with_their_labels() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [5, 5, 30, 30], [10, 0, 20, 10], [40, 40, 50, 50]], dtype=torch.float32)
    item = LabelledImage(torch.zeros(3, 60, 60, dtype=torch.uint8), torch.tensor([1, 2, 3, 4]), boxes)
    cropped = crop(item, top=10, left=10, height=30, width=30)
    assert cropped.labels.tolist() == [2]  # the first and third only touch the region, the last lies outside
    assert cropped.boxes_xyxy_px.tolist() == [[0, 0, 20, 20]]


def test_the_whole_augmentation_keeps_boxes_on_their_pixels() -> None:
    item = item_with_box(480, 640, (200, 130, 420, 350))
    for seed in range(12):
        changed = DETR_TRAIN(item, np.random.default_rng(seed))
        found, told = white_box(changed.image), changed.boxes_xyxy_px[0].tolist()
        assert max(abs(a - b) for a, b in zip(found, told, strict=True)) <= 1.5, seed


def test_augmentation_draws_flips_crops_and_all_sizes() -> None:
    item = item_with_box(48, 64, (4, 3, 20, 25))
    small = TrainTransform((48, 51, 54), 133, (40, 50, 60), (38, 60))
    results = [small(item, np.random.default_rng(seed)) for seed in range(300)]
    assert {min(result.size) for result in results} == {48, 51, 54}
    aspects = [result.size[1] / result.size[0] for result in results]
    uncropped = np.mean([abs(aspect - 4 / 3) < 0.03 for aspect in aspects])
    assert 0.4 < uncropped < 0.65
    whole = [result for result, aspect in zip(results, aspects, strict=True) if abs(aspect - 4 / 3) < 0.03]
    flipped = np.mean([result.boxes_xyxy_px[0, 0] > result.size[1] / 2 for result in whole])
    assert 0.4 < flipped < 0.6


def test_no_crop_sizes_no_crops() -> None:
    item = item_with_box(48, 64, (4, 3, 20, 25))
    transform = TrainTransform((96,), 133, (), (38, 60))
    for seed in range(20):
        assert transform(item, np.random.default_rng(seed)).size == (96, 128)


def test_regions_span_the_range_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    regions = np.array([random_region((500, 30), (384, 600), rng) for _ in range(3000)])
    top, left, height, width = regions.T
    assert (height.min(), height.max()) == (384, 500)
    assert set(width) == {30} and set(left) == {0}  # narrower than the range: the whole width
    assert (top >= 0).all() and (top + height <= 500).all() and (top + height == 500).any() and (top == 0).any()


def test_no_targets_pass_through_everything() -> None:
    item = LabelledImage(
        torch.zeros(3, 50, 70, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    )
    for seed in range(8):
        changed = TrainTransform((48,), 133, (40,), (20, 30))(item, np.random.default_rng(seed))
        assert changed.boxes_xyxy_px.shape == (0, 4) and changed.labels.dtype == torch.int64
