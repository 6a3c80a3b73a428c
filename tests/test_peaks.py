"""The machine's peaks: rates, measured on the spot."""

import pytest
import torch
from detr_profiling.limits import peaks as peaks_file
from detr_profiling.limits.peaks import Peaks, measure_peaks
from torch import Tensor


def test_peaks_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peaks_file.COPY_MIB, "cpu", 4)
    monkeypatch.setitem(peaks_file.GEMM_SIDE, "cpu", 64)
    monkeypatch.setattr(peaks_file, "best_s", lambda run, device: [run(), 0.5][1])
    found = measure_peaks(torch.device("cpu"), torch.bfloat16)
    assert found == Peaks(2 * 4 * 2**20 / 0.5 / 1e9, 2 * 64**3 / 0.5 / 1e12, "bf16")


def test_a_peak_is_the_best_of_several_runs_after_a_warm_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.1, 3.0, 2.0, 4.0, *[5.0] * 100])
    monkeypatch.setattr(peaks_file, "host_s", lambda run: next(times))
    assert peaks_file.best_s(lambda: None, torch.device("cpu")) == 2.0


def test_a_slow_run_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks_file, "BUDGET_S", -1.0)
    runs = []
    peaks_file.best_s(lambda: runs.append(0), torch.device("cpu"))
    assert len(runs) == 2


def test_matrices_are_random_and_copies_smaller_where_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peaks_file.COPY_MIB, "cpu", 1024)
    asked, copied = [], []
    rand = torch.rand

    def full(size: int, device: torch.device) -> Tensor:
        asked.append(size // 2**18)
        if asked[-1] > 256:
            raise torch.OutOfMemoryError
        copied.append(rand(1000))
        return copied[-1]

    monkeypatch.setattr(torch, "rand", full)
    monkeypatch.setattr(peaks_file, "best_s", lambda run, device: 1.0)
    assert peaks_file.bandwidth_gb_s(torch.device("cpu")) == 2 * 4000 / 1e9
    assert asked == [1024, 512, 256]
    assert copied[0].std() > 0.1
