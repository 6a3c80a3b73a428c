"""A few batches stand for the order of training on images of many sizes: they compute as much, on images as large."""

import pytest
from detr_profiling.mixed_sizes import LARGEST_PX, BatchShape, coco_size, order_of, padding, typical_shapes

from detr_fast.data.sampler import Position
from detr_fast.training.assembly import SHAPE_STEP_PX


def image_px(shapes: list[BatchShape]) -> float:
    return sum(shape.image_px for shape in shapes) / sum(len(shape.sizes) for shape in shapes)


def test_padding_is_pixels_computed_over_pixels_of_images() -> None:
    shape = BatchShape.of([Position(0, 0, (1, 1)), Position(0, 1, (1, 1))], lambda _, index: ((2, 3), (4, 1))[index])
    assert shape == ([(2, 3), (4, 1)], (4, 3))
    assert padding([shape]) == 2 * 12 / (6 + 4)
    assert padding([shape, BatchShape([(5, 5)] * 2, (5, 5))]) == (24 + 50) / (10 + 50)
    assert shape.in_steps(4).room == (4, 4) and BatchShape.of([Position(0, 0, (8, 8))], lambda *_: (2, 3)).room == (
        8,
        8,
    )


def test_both_orders_have_the_same_images() -> None:
    random, bucketed = (order_of(4, 42, buckets) for buckets in (False, True))
    sizes = [sorted(size for shape in order for size in shape.sizes) for order in (random, bucketed)]
    assert sizes[0] == sizes[1] and padding(random) > 1.4 and padding(bucketed) < 1.05


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("seed", [0, 42])
def test_four_batches_compute_as_much_for_an_image_as_the_whole_order(
    batch_size: int, buckets: bool, seed: int
) -> None:
    order, typical = order_of(batch_size, seed, buckets), typical_shapes(batch_size, seed, buckets, LARGEST_PX)
    assert len(typical) == 4 and all(shape in order for shape in typical)
    assert image_px(typical) == pytest.approx(image_px(order), rel=0.02)
    for step in (1, SHAPE_STEP_PX):
        found, whole = (padding([shape.in_steps(step) for shape in shapes]) for shapes in (typical, order))
        assert found == pytest.approx(whole, rel=0.05)


def test_sizes_are_scaled() -> None:
    full = [coco_size(7, 0, index) for index in range(200)]
    small = [coco_size(7, 0, index, 160) for index in range(200)]
    assert max(map(min, full)) == 800 and max(map(min, small)) == 160
    for one, other in zip(full, small, strict=True):
        assert one == pytest.approx([5 * side for side in other], abs=2.5)
