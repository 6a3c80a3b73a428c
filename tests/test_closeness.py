"""The judge itself: twice eager's error plus the floor, and no NaN passes."""

import pytest
import torch
from detr_profiling.comparison.closeness import assert_close, closeness, relative_floor

ORACLE = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def off_by(error: float) -> torch.Tensor:
    return ORACLE + torch.tensor([0.0, error, -error / 2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "eager_error", "floor", "close"),
    [
        (0.2, 0.1, 1e-9, True),
        (0.21, 0.1, 1e-9, False),
        (0.21, 0.1, 0.02, True),
        (0.3, 0.0, 0.2, False),
        (0.0, 0.0, 0, True),
    ],
)
def test_twice_the_error_of_eager_and_the_floor(error: float, eager_error: float, floor: float, close: bool) -> None:
    judged = closeness(off_by(error), ORACLE, off_by(eager_error), floor, "logits")
    assert bool(judged) is judged.close is close
    assert judged.error == pytest.approx(error)
    assert judged.allowed == pytest.approx(2 * eager_error + floor)
    assert judged.message.startswith("logits: close" if close else "logits: NOT close")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["result", "oracle", "eager", "result and oracle"])
def test_no_nan_passes(value: float, place: str) -> None:
    broken = ORACLE.clone()
    broken[1] = value
    result, oracle, eager = (broken if name in place.split() else ORACLE for name in ("result", "oracle", "eager"))
    with pytest.raises(AssertionError, match="NOT close"):
        assert_close(result, oracle, eager, floor=1.0)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        closeness(ORACLE[None], ORACLE, ORACLE, 1.0)


def test_float32_is_compared_in_float64() -> None:
    result = (ORACLE + 1e-9).float()
    assert closeness(result, ORACLE, result, 0.0).error < 1e-6
    assert relative_floor(ORACLE, 1e-3) == pytest.approx(4e-3)
