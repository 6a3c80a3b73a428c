"""The embedded data set: the same for the same seed, worth the name, and never half written."""

from pathlib import Path

import numpy as np
import pytest

from detr_fast.config import UserError
from detr_fast.data.shapes import CLASSES, SMALLEST_PX, draw_image, ensure_shapes, overlap_fraction, parse_shapes


def test_an_image_depends_on_its_seed_and_index_alone() -> None:
    one, again, other = draw_image(3, 5, 64), draw_image(3, 5, 64), draw_image(3, 6, 64)
    assert np.array_equal(one.image, again.image) and one.boxes_xyxy_px == again.boxes_xyxy_px
    assert not np.array_equal(one.image, other.image)


@pytest.mark.parametrize("side", [64, 128])
def test_it_stays_a_detection_problem(side: int) -> None:
    drawings = [draw_image(0, index, side) for index in range(200)]
    assert {label for drawing in drawings for label in drawing.labels} == set(range(len(CLASSES)))
    assert {len(drawing.labels) for drawing in drawings} == {1, 2, 3, 4, 5}
    boxes = np.array([box for drawing in drawings for box in drawing.boxes_xyxy_px])
    assert boxes.min() >= 0 and boxes.max() <= side
    spans = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert spans.min() >= SMALLEST_PX * 0.7 and spans.max() > 2 * spans.min()
    fractions = [
        overlap_fraction(a, b) for d in drawings for a in d.boxes_xyxy_px for b in d.boxes_xyxy_px if a is not b
    ]
    assert 0 < max(fractions) < 0.25


@pytest.mark.parametrize("data", ["shapes:12", "shapes:big", "shapes:²", "shapes:-64", "shapes:4096"])
def test_a_side_that_is_none_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="--data"):
        parse_shapes(data)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="DETR_FAST_CACHE"):
        ensure_shapes(64, sizes={"train": 1, "val": 1})


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr("detr_fast.data.shapes.write_split", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_shapes(64, sizes={"train": 1, "val": 1})
    assert list(tmp_path.iterdir()) == []
