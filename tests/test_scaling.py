"""docs/scaling.md: its table is what its formulas give, and the formulas give what is worked out by hand."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detr_profiling.pages.formats import count, number, percent

from detr_fast.config import model_config
from detr_fast.model.detr import DETR

STEP_MS, BACKWARD_MS, IMAGES, BUCKET_BYTES, NORMALIZER_BYTES = 22.9, 13.74, 16, 25 * 2**20, 8


def all_reduce_ms(gpus: int, nbytes: float, node: int = 8, gb_s: tuple = (450, 50), us: tuple = (3.4, 14)) -> float:
    """Return T(s) of the page; `gb_s` and `us` within a node and between nodes."""
    nodes = -(-gpus // node)
    inside = gpus // nodes
    bytes_within, bytes_between = 2 * (inside - 1) / inside * nbytes, 2 * (nodes - 1) / nodes * nbytes / inside
    latency_us = 2 * (inside - 1) * us[0] + 2 * math.ceil(math.log2(nodes)) * us[1]
    return (bytes_within / gb_s[0] + bytes_between / gb_s[1]) / 0.8 / 1e6 + latency_us / 1e3


def not_hidden_ms(backward_ms: float, bucket_ms: float, buckets: int) -> float:
    """Return E_b - T_back of the page."""
    end_ms = 0.0
    for bucket in range(1, buckets + 1):
        end_ms = max(end_ms, backward_ms * bucket / buckets) + bucket_ms
    return end_ms - backward_ms


def gradient_bytes() -> int:
    with torch.device("meta"):
        parameters = DETR(model_config("detr_r50")).parameters()
    return sum(4 * parameter.numel() for parameter in parameters if parameter.requires_grad)


def rows(nbytes: int) -> Iterator[str]:
    for gpus in (1, 8, 64, 256):
        for overlapped in (True, False) if gpus > 1 else (True,):
            buckets = math.ceil(nbytes / BUCKET_BYTES) if overlapped else 1
            bucket_ms, normalizers_ms = all_reduce_ms(gpus, nbytes / buckets), all_reduce_ms(gpus, NORMALIZER_BYTES)
            exposed_ms = normalizers_ms + (not_hidden_ms(BACKWARD_MS, bucket_ms, buckets) if overlapped else bucket_ms)
            step_ms = STEP_MS + exposed_ms
            kind = "none" if gpus == 1 else "overlapped" if overlapped else "no overlap"
            times = map(number, (buckets * bucket_ms + normalizers_ms, exposed_ms, step_ms))
            figures = (*times, count(round(1e3 * gpus * IMAGES / step_ms)), percent(STEP_MS / step_ms))
            yield f"| {' | '.join((str(gpus), kind, *figures))} |"


def test_the_table_is_what_the_formulas_give() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    nbytes = gradient_bytes()
    assert nbytes == 4 * (41_524_768 - 64 * 3 * 49 - 212_992), "the first convolution and layer1 are frozen"
    assert f"| {nbytes / 1e6:.1f} MB |" in page
    assert re.findall(r"^\| \d.*", page, re.MULTILINE) == list(rows(nbytes))
    assert f"256 GPUs of 16 images {number(0.3 * 256 * IMAGES / 1e3)} ms a step" in page


@pytest.mark.parametrize(
    ("gpus", "expected_ms"),
    [
        (1, 0.0),
        (2, 2 * 1 / 2 * 8e6 / 80e6 + 2 * 0.002),  # 80 MB a millisecond
        (4, 2 * 3 / 4 * 8e6 / 80e6 + 6 * 0.002),  # 3 messages to reduce and 3 to gather
        (8, 2 * 3 / 4 * 8e6 / 80e6 + 6 * 0.002 + 2 * 1 / 2 * 2e6 / 8e6 + 2 * 0.005),  # a quarter to one other node
        (32, 2 * 3 / 4 * 8e6 / 80e6 + 6 * 0.002 + 2 * 7 / 8 * 2e6 / 8e6 + 6 * 0.005),  # 3 up a tree and 3 down
    ],
)
def test_an_all_reduce_by_hand(gpus: int, expected_ms: float) -> None:
    assert all_reduce_ms(gpus, 8e6, node=4, gb_s=(100, 10), us=(2, 5)) == pytest.approx(expected_ms)


def test_buckets_wait_for_one_another() -> None:
    """They come at 2, 4 and 6 ms; where each takes 5, the last one ends at 17."""
    assert not_hidden_ms(6, 5.0, buckets=3) == 17 - 6
    assert not_hidden_ms(6, 1.5, buckets=3) == 1.5
