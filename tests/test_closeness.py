"""The judge itself: twice eager's error plus the tolerance, and no NaN passes."""

import pytest
import torch
from detr_profiling.comparison.closeness import assert_close, closeness, scaled_tolerance

EXACT = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def off_by(error: float) -> torch.Tensor:
    return EXACT + torch.tensor([0.0, error, -error / 2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("error", "eager_error", "tolerance", "close"),
    [
        (0.2, 0.1, 1e-9, True),
        (0.21, 0.1, 1e-9, False),
        (0.21, 0.1, 0.02, True),
        (0.3, 0.0, 0.2, False),
        (0.0, 0.0, 0, True),
    ],
)
def test_twice_the_error_of_eager_and_the_tolerance(
    error: float, eager_error: float, tolerance: float, close: bool
) -> None:
    judged = closeness(off_by(error), EXACT, off_by(eager_error), tolerance, "logits")
    assert bool(judged) is judged.close is close
    assert judged.error == pytest.approx(error)
    assert judged.allowed == pytest.approx(2 * eager_error + tolerance)
    assert judged.message.startswith("logits: close" if close else "logits: NOT close")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["result", "exact", "eager", "result and exact"])
def test_no_nan_passes(value: float, place: str) -> None:
    broken = EXACT.clone()
    broken[1] = value
    result, exact, eager = (broken if name in place.split() else EXACT for name in ("result", "exact", "eager"))
    with pytest.raises(AssertionError, match="NOT close"):
        assert_close(result, exact, eager, tolerance=1.0)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        closeness(EXACT[None], EXACT, EXACT, 1.0)


def test_float32_is_compared_in_float64() -> None:
    result = (EXACT + 1e-9).float()
    assert closeness(result, EXACT, result, 0.0).error < 1e-6
    assert scaled_tolerance(EXACT, 1e-3) == pytest.approx(4e-3)
