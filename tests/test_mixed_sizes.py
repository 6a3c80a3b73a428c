"""A few batches stand for the order of training on images of many sizes: they compute as much, on images as large."""

import itertools

import numpy as np
import pytest
from detr_profiling.mixed_sizes import (
    LARGEST_PX,
    PHOTOGRAPHS,
    BatchShape,
    coco_sizes,
    order_of,
    padding,
    typical_shapes,
)

from detr_fast.data.buckets import shape_batches
from detr_fast.data.sampler import Position
from detr_fast.data.transforms import EvaluationTransform
from detr_fast.training.build import SHAPE_STEP_PX, shape_step_px


def image_px(shapes: list[BatchShape]) -> float:
    return sum(shape.image_px for shape in shapes) / sum(len(shape.sizes) for shape in shapes)


def test_padding_is_pixels_computed_over_pixels_of_images() -> None:
    shape = BatchShape.of([Position(0, 0), Position(0, 1)], lambda _, images: np.array([(2, 3), (4, 1)])[images])
    assert (shape.sizes, shape.padded_size) == ([(2, 3), (4, 1)], (4, 3))
    assert padding([shape]) == 2 * 12 / (6 + 4)
    assert padding([shape, BatchShape([(5, 5)] * 2, (5, 5))]) == (24 + 50) / (10 + 50)
    assert shape.in_steps(4).padded_size == (4, 4)
    assert BatchShape.of([Position(0, 0, (8, 8))], lambda *_: np.array([(2, 3)])).padded_size == (8, 8)


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_long_run_has_few_shapes(device: str) -> None:
    """Keeping code and memory for every shape that there was, a process would grow without end."""
    shapes = [shape for seed in range(7) for shape in order_of(8, seed, buckets=True, largest_px=384)]
    rounded = [shape.in_steps(shape_step_px(device, compiled=False)) for shape in shapes]
    assert len({shape.padded_size for shape in shapes}) > 800 and len({shape.padded_size for shape in rounded}) < 100
    assert padding(rounded) < 1.25


@pytest.mark.parametrize(("batch_size", "before"), [(2, 1.17), (8, 1.51), (16, 1.64)])
def test_little_is_padding_in_evaluation(batch_size: int, before: float) -> None:
    """Of 5,000 photographs of the mix, in the order of ids and by shape."""
    sizes = EvaluationTransform(800, 1333)(PHOTOGRAPHS[np.random.default_rng(0).integers(100, size=5000)]).sizes

    def padding_of(batches: list[list[int]]) -> float:
        positions = [[Position(0, index) for index in batch] for batch in batches]
        return padding([BatchShape.of(batch, lambda _, images: sizes[images]) for batch in positions])

    by_id = [list(range(start, min(start + batch_size, 5000))) for start in range(0, 5000, batch_size)]
    by_shape = shape_batches(sizes, batch_size)
    assert sorted(itertools.chain(*by_shape)) == list(range(5000))
    assert padding_of(by_id) == pytest.approx(before, abs=0.005)
    assert padding_of(by_shape) < 1.01


def test_sizes_are_scaled() -> None:
    full, small = (coco_sizes(7, 0, range(200), largest_px) for largest_px in (LARGEST_PX, 160))
    assert full.min(1).max() == 800 and small.min(1).max() == 160
    np.testing.assert_allclose(full, 5 * small, atol=2.5)
