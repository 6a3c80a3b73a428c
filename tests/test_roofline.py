"""What work and peaks make of a measured time: the bound, what it is of, time over bound, and MFU."""

from dataclasses import asdict

import pytest
from detr_profiling.limits.peaks import Peaks
from detr_profiling.limits.roofline import Roofline, Work, roofline

PEAKS = Peaks(bandwidth_gb_s=100.0, gemm_tflop_s=2.0, dtype="bf16")
"""10^8 bytes, or 2 x 10^9 operations, a millisecond."""


def example(range_ms: dict[str, float]) -> Roofline:
    work = {
        "copy": Work(0, 10**8, 10**8),
        "backbone": Work(8 * 10**9, 10**8, 5 * 10**8),
        "loss": Work(10**6, 2 * 10**8, 3 * 10**8),
    }
    return roofline(work, range_ms, 20.0, PEAKS)


def test_bound_time_over_bound_and_mfu() -> None:
    found = example({"data wait": 1.0, "copy": 2.0, "backbone": 8.0, "loss": 6.0, "other": 3.0})
    wait, copy, backbone, loss, other = found.ranges
    assert [row.name for row in found.ranges] == ["data wait", "copy", "backbone", "loss", "other"]
    assert (backbone.gflop, backbone.bound_ms, backbone.bound_by, backbone.times_bound) == (8.0, 4.0, "compute", 2.0)
    assert backbone.mfu == pytest.approx(0.5) and backbone.minimum_mib == 10**8 / 2**20
    assert backbone.moved_mib == 5 * 10**8 / 2**20
    assert (loss.bound_ms, loss.bound_by, loss.times_bound) == (2.0, "memory", 3.0)
    assert loss.mfu == pytest.approx(10**6 / (6 * 2e9))
    for row in (wait, copy, other):  # the way to the device has another limit; the others do nothing
        assert (row.bound_ms, row.bound_by, row.times_bound, row.mfu) == (None, None, None, None)
    assert copy.minimum_mib > 0 and copy.ms == 2.0


def test_the_total_is_all_ranges_one_after_the_other() -> None:
    total = example({"copy": 2.0, "backbone": 8.0, "loss": 6.0}).total
    assert (total.bound_ms, total.bound_by, total.ms) == (6.0, "compute", 20.0)
    assert total.times_bound == pytest.approx(20 / 6) and total.gflop == pytest.approx(8.001)
    assert total.mfu == pytest.approx(8.001e9 / (20 * 2e9))


def test_in_a_compiled_model_the_forward_pass_is_one_range() -> None:
    found = example({"copy": 2.0, "forward": 8.0, "loss": 6.0})
    assert [row.name for row in found.ranges] == ["copy", "forward", "loss"]
    assert found.ranges[1].gflop == 8.0 and found.ranges[1].times_bound == 2.0
    assert example({"copy": 2.0, "loss": 6.0}).ranges[1].name == "backbone"  # without a time for either it stays


def test_a_range_without_a_time_has_a_bound_alone() -> None:
    for times in ({}, {"backbone": 0.0}):
        backbone = example({"copy": 2.0, "loss": 6.0, **times}).ranges[1]
        assert backbone.bound_ms == 4.0 and backbone.times_bound is None and backbone.mfu is None


def test_a_few_bytes_are_no_bound() -> None:
    """Otherwise what is between the ranges would have taken a million times it."""
    (other,) = roofline({"other": Work(0, 28, 28)}, {"other": 3.0}, 20.0, PEAKS).ranges
    assert (other.bound_ms, other.bound_by, other.times_bound, other.mfu) == (None, None, None, None)
    assert other.minimum_mib > 0


def test_nothing_to_do_is_no_division_by_zero() -> None:
    found = roofline({}, {}, 0.0, PEAKS)
    assert found.ranges == () and found.total.times_bound is None and found.total.bound_by is None


def test_the_block_of_a_result() -> None:
    block = asdict(example({"backbone": 8.0, "loss": 6.0}))
    assert block.keys() == {"peaks", "ranges", "total"}
    assert block["peaks"] == {"bandwidth_gb_s": 100.0, "gemm_tflop_s": 2.0, "dtype": "bf16"}
    names = {"name", "gflop", "minimum_mib", "moved_mib", "ms", "bound_ms", "bound_by", "times_bound", "mfu"}
    assert all(row.keys() == names for row in (*block["ranges"], block["total"]))
