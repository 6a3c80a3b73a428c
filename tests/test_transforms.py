"""Augmentation and resizing against DETR's formulas, Pillow's pixels and the pixels that a box encloses."""

import numpy as np
import pytest
import torch
from detr_kernels import PackedImages, resize_normalize_pad
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from detr_fast.boxes import cxcywh_to_xyxy
from detr_fast.data.draws import Draws
from detr_fast.data.transforms import (
    CROP,
    CROP_SIZE,
    HFLIP,
    SIZE,
    EvaluationTransform,
    SampledAugmentation,
    TrainTransform,
    Transform,
    boxes_within,
    random_crops,
    resized_sizes,
)

DETR_SIZES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
DETR_TRAIN = TrainTransform(DETR_SIZES, 1333, (400, 500, 600), (384, 600))
NO_BOXES = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def detr_size(width: int, height: int, size: int, max_size: int) -> tuple[int, int]:
    """(h, w) by the published formulas: the bound rounds the shorter side, which cuts the longer one."""
    if float(max(width, height)) / float(min(width, height)) * size > max_size:
        size = round(max_size * float(min(width, height)) / float(max(width, height)))
    if (width <= height and width == size) or (height <= width and height == size):
        return height, width
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


def resized(image_size: tuple[int, int], size: int, max_size: int) -> tuple[int, int]:
    ((height, width),) = resized_sizes(np.array([image_size]), size, max_size).tolist()
    return height, width


def augmentations_of(transform: Transform, image_size: tuple[int, int], count: int) -> list[SampledAugmentation]:
    """Of as many images of one size."""
    return list(transform(np.array([image_size] * count), Draws(7, 0, range(count))))


def image_with_box(height: int, width: int, box: tuple[int, int, int, int]) -> Tensor:
    """Black (3, h, w), but for the box xyxy, which is white."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = 255
    return image


def seen(image: Tensor, augmentation: SampledAugmentation, draft_scale: int = 1) -> Tensor:
    """What `augmentation` makes of `image` (3, h, w), which is `draft_scale` already: levels (3, h', w')."""
    top, left, bottom, right = augmentation.on_grid(draft_scale)
    region = image[:, top:bottom, left:right].permute(1, 2, 0)
    packed = PackedImages.from_list([region], [augmentation.size], [augmentation.hflip])
    return resize_normalize_pad(packed, *augmentation.size, (0, 0, 0), (1 / 255,) * 3, backend="ref")[0].round()


def boxes_px(
    augmentation: SampledAugmentation,
    *boxes: tuple[float, float, float, float],
    draft_scale: int = 1,
    min_visible: float = 0.0,
) -> tuple[Tensor, list[int]]:
    """The boxes xyxy in pixels of what `augmentation` makes of their image, and which of them are left."""
    height, width = augmentation.size
    kept, labels = boxes_within(
        torch.tensor(boxes, dtype=torch.float32) / draft_scale,
        torch.arange(len(boxes)),
        augmentation.on_grid(draft_scale),
        augmentation.hflip,
        min_visible,
    )
    return cxcywh_to_xyxy(kept) * torch.tensor([width, height, width, height]), labels.tolist()


def white_box(image: torch.Tensor) -> list[float]:
    """Corners of what is at least half white; pixels (i, i + 1)."""
    rows, columns = torch.nonzero(image[0] > 127, as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000), st.integers(1, 1500))
def test_sizes_are_detrs(width: int, height: int, size: int, max_size: int) -> None:
    expected = detr_size(width, height, size, max_size)
    actual = resized((height, width), size, max_size)
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
    assert resized((height, width), size, 1333) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 1200), (1, 2)])
def test_fault_18_extreme_aspects_never_give_zero_size(size: tuple[int, int]) -> None:
    image = torch.full((3, *size), 9, dtype=torch.uint8)
    train = TrainTransform((48, 80), 133, (40, 60), (38, 60))
    augmentations = augmentations_of(train, size, 12) + augmentations_of(EvaluationTransform(80, 133), size, 1)
    for augmentation in augmentations:
        assert min(augmentation.size) >= 1
        assert (
            max(augmentation.size) * (1 - 0.5 / min(augmentation.size)) <= 133
        )  # the shorter side is rounded, by half a pixel at most
        assert seen(image, augmentation).mean() == 9


def test_resize_is_pillows_within_a_level() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    for size in ((75, 100), (200, 266), (33, 160)):
        ours = seen(torch.from_numpy(pixels).permute(2, 0, 1), SampledAugmentation((0, 0, 120, 160), size)).permute(
            1, 2, 0
        )
        pillows = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
        difference = np.abs(ours.numpy().astype(int) - pillows)
        assert difference.mean() < 0.5 and difference.max() <= 2


def test_boxes_follow_the_pixels() -> None:
    image, box = image_with_box(60, 80, (8, 12, 40, 30)), (8, 12, 40, 30)
    for augmentation, expected in (
        (SampledAugmentation((0, 0, 60, 80), (60, 80), hflip=True), [40, 12, 72, 30]),
        (SampledAugmentation((0, 0, 60, 80), (120, 240)), [24, 24, 120, 60]),
        (SampledAugmentation((20, 10, 55, 30), (35, 20)), [0, 0, 20, 10]),
        (SampledAugmentation((20, 10, 55, 30), (70, 60), hflip=True), [0, 0, 60, 20]),
        (SampledAugmentation((0, 20, 60, 80), (60, 60), hflip=True), [40, 12, 60, 30]),
    ):
        boxes, _ = boxes_px(augmentation, box)
        assert white_box(seen(image, augmentation)) == boxes[0].round(decimals=4).tolist() == expected


def test_boxes_that_a_crop_leaves_empty_go_with_their_labels() -> None:
    boxes, labels = boxes_px(
        SampledAugmentation((10, 10, 40, 40), (30, 30)),
        (0, 0, 10, 10),
        (5, 5, 30, 30),
        (10, 0, 20, 10),
        (40, 40, 50, 50),
    )
    assert labels == [1]  # the first and third only touch the crop box, the last lies outside
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0, 20, 20]]))


def test_boxes_of_which_a_crop_leaves_too_little_go_too() -> None:
    """A quarter of the first is left, half of the second, all of the third."""
    augmentation = SampledAugmentation((10, 10, 40, 40), (30, 30), hflip=True)
    boxes = (0.0, 0.0, 20.0, 20.0), (35.0, 12.0, 45.0, 20.0), (10.3, 11.7, 39.1, 40.0)
    for least, kept in ((0, [0, 1, 2]), (0.25, [0, 1, 2]), (0.26, [1, 2]), (0.5, [1, 2]), (0.51, [2]), (1, [2])):
        found, labels = boxes_px(augmentation, *boxes, min_visible=least)
        assert labels == kept
        assert torch.equal(found, boxes_px(augmentation, *(boxes[index] for index in kept))[0])


def test_the_whole_augmentation_keeps_boxes_on_their_pixels() -> None:
    image, box = image_with_box(480, 640, (200, 130, 420, 350)), (200, 130, 420, 350)
    for augmentation in augmentations_of(DETR_TRAIN, (480, 640), 12):
        found, told = white_box(seen(image, augmentation)), boxes_px(augmentation, box)[0][0].tolist()
        assert max(abs(a - b) for a, b in zip(found, told, strict=True)) <= 1.5, augmentation


def two_steps(image: Tensor, boxes: list[float], draws: Draws) -> tuple[Tensor, np.ndarray]:
    """DETR's own order on a Pillow image: flip, then resize, crop, resize; levels (3, h, w) and the box, in pixels."""
    picture, box = Image.fromarray(image.permute(1, 2, 0).numpy()), np.array(boxes)

    def resize(size: tuple[int, int]) -> None:
        nonlocal picture, box
        box = box * np.array([size[1] / picture.width, size[0] / picture.height] * 2)
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)

    if draws.fraction(HFLIP) < 0.5:
        box = np.array([picture.width - box[2], box[1], picture.width - box[0], box[3]])
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draws.fraction(CROP) < 0.5:
        shorter = draws.choice(CROP_SIZE, DETR_TRAIN.crop_sizes).item()
        resize(resized((picture.height, picture.width), shorter, 16384))
        corner, size = random_crops(np.array([[picture.height, picture.width]]), DETR_TRAIN.crop_range, draws)
        top, left, height, width = corner[0].tolist() + size[0].tolist()
        box = np.clip(box - np.array([left, top] * 2), 0, [width, height] * 2)
        picture = picture.crop((left, top, left + width, top + height))
    resize(resized((picture.height, picture.width), draws.choice(SIZE, DETR_SIZES).item(), 1333))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1), box


def test_one_resize_shows_what_detrs_two_show() -> None:
    """The same size; the same picture, but for half a pixel and what a second resize blurs; the same boxes."""
    ramp = torch.linspace(0, 255, 640).expand(480, 640)
    image = torch.stack((ramp, torch.linspace(0, 255, 480)[:, None].expand(480, 640), ramp.flip(1))).to(torch.uint8)
    box = [120.0, 90, 600, 400]
    for number, augmentation in enumerate(augmentations_of(DETR_TRAIN, (480, 640), 16)):
        theirs, their_box = two_steps(image, box, Draws(7, 0, [number]))
        assert augmentation.size == theirs.shape[1:]
        assert (seen(image, augmentation) - theirs).abs().mean() < 1
        np.testing.assert_allclose(boxes_px(augmentation, tuple(box))[0][0].numpy(), their_box, atol=1.5)


def test_a_jpeg_is_shrunk_where_twice_the_pixels_are_left() -> None:
    whole = (0, 0, 3000, 4000)
    sizes = {(3000, 4000): 1, (1501, 2001): 1, (750, 1000): 2, (749, 1000): 2, (375, 500): 4, (180, 240): 8, (9, 12): 8}
    assert {size: SampledAugmentation(whole, size).draft_scale() for size in sizes} == sizes
    assert SampledAugmentation((0, 0, 600, 800), (800, 1066)).draft_scale() == 1
    assert SampledAugmentation((1000, 1000, 1800, 2000), (400, 500)).draft_scale() == 1  # what counts is the crop box
    augmentation = SampledAugmentation((200, 400, 1400, 2000), (300, 400))
    boxes, _ = boxes_px(augmentation, (400, 200, 1200, 800), draft_scale=augmentation.draft_scale())
    assert augmentation.on_grid(2) == (100, 200, 700, 1000) and boxes[0].tolist() == [0, 0, 200, 150]


@pytest.mark.parametrize("transform", [DETR_TRAIN, EvaluationTransform(800, 1333)])
def test_an_images_plan_does_not_depend_on_those_made_with_it(transform: Transform) -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, (200, 2))
    together = list(transform(sizes, Draws(5, 3, range(200))))
    for some in (np.arange(120, 124), np.array([199, 0, 77]), np.array([13])):
        assert list(transform(sizes[some], Draws(5, 3, some))) == [together[index] for index in some]


def test_augmentation_draws_flips_crops_and_all_sizes() -> None:
    small = TrainTransform((48, 51, 54), 133, (40, 50, 60), (38, 60))
    results = augmentations_of(small, (48, 64), 300)
    assert {min(result.size) for result in results} == {48, 51, 54}
    aspects = [result.size[1] / result.size[0] for result in results]
    uncropped = np.mean([abs(aspect - 4 / 3) < 0.03 for aspect in aspects])
    assert 0.4 < uncropped < 0.65
    whole = [result for result, aspect in zip(results, aspects, strict=True) if abs(aspect - 4 / 3) < 0.03]
    flipped = np.mean([result.hflip for result in whole])
    assert 0.4 < flipped < 0.6


def test_no_crop_sizes_no_crops() -> None:
    transform = TrainTransform((96,), 133, (), (38, 60))
    for augmentation in augmentations_of(transform, (48, 64), 20):
        assert augmentation.size == (96, 128) and augmentation.crop_box == (0, 0, 48, 64)


def test_crops_span_the_range_and_stay_inside() -> None:
    corner, size = random_crops(np.array([(500, 30)] * 3000), (384, 600), Draws(0, 0, range(3000)))
    (top, left), (height, width) = corner.T, size.T
    assert (height.min(), height.max()) == (384, 500)
    assert set(width) == {30} and set(left) == {0}  # narrower than the range: the whole width
    assert (top >= 0).all() and (top + height <= 500).all() and (top + height == 500).any() and (top == 0).any()


def test_no_targets_pass_through_everything() -> None:
    for augmentation in augmentations_of(TrainTransform((48,), 133, (40,), (20, 30)), (50, 70), 8):
        boxes, labels = boxes_within(*NO_BOXES, augmentation.on_grid(1), augmentation.hflip)
        assert boxes.shape == (0, 4) and labels.dtype == torch.int64
