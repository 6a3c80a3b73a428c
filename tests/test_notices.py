"""The suite notices: a wrong kernel, a slow step, a leak and a read by the host are planted, and each is reported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import detr_kernels
import pytest
import torch
from detr_profiling import rounds
from detr_profiling.ladder import LadderOptions, build_entries, measuring
from detr_profiling.measuring import timing
from detr_profiling.measuring.measurement import Configuration, Measurement, measure_workload, write_references
from detr_profiling.measuring.row import LadderRow
from detr_profiling.own_workload import build_workload
from detr_profiling.rounds import rows_of
from detr_profiling.tracing.recording import profile_workload
from detr_profiling.workload import Workload, WorkloadOptions
from rich.console import Console
from torch import Tensor

from detr_fast import host_memory
from detr_fast.training.step import TrainStep
from tests.planted_clock import PlantedClock

TINY = WorkloadOptions.of(model="detr_tiny", size="32x32", batch_size=2, device="cpu", precision="fp32", threads=1)
SHORT = LadderOptions.of(
    **{"size": "64x64", "device": "cpu", "precision": "fp32", "channels_last": False, "kernels": "ref"},
    **{"attention": "ref", "compile": False, "runs": 2, "rounds": 1, "threads": 1, "objects": 2},
)
"""Three rows: the reference, once more with its memory kept, and ours by references alone."""


def climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[LadderRow]:
    """The ladder, measured in this process, where things can be planted, and whose allocator stays as it is."""

    def measure(configuration: Configuration, runs: int, references: Path | None, limit_s: object) -> Measurement:
        monkeypatch.setattr(host_memory, "PROCESS", host_memory.Process())
        return measure_workload(configuration, runs, references)

    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(rounds, "measure_in_process", measure)
    monkeypatch.setattr(rounds, "write_references_in_process", write_references)
    entries = build_entries(SHORT)
    list(measuring(entries, SHORT, Console(quiet=True)).run())
    return rows_of(entries)


def test_a_wrong_kernel_and_a_slow_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PlantedClock(tick_s=1e-3)
    monkeypatch.setattr(timing, "time", clock)
    before = climb(tmp_path, monkeypatch)
    assert [row.close for row in before] == [True, True, True]
    assert [row.median_ms for row in before] == pytest.approx([1, 1, 1])

    def wrong(x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return detr_kernels.fused_add_layer_norm(x, residual, weight * 1.01, *rest)

    step = TrainStep.__call__

    def slow(self: TrainStep, batches: Any) -> dict[str, Tensor]:
        clock.sleep(4e-3)
        return step(self, batches)

    monkeypatch.setattr("detr_fast.model.transformer.fused_add_layer_norm", wrong)
    monkeypatch.setattr(TrainStep, "__call__", slow)
    after = climb(tmp_path, monkeypatch)
    assert [row.close for row in after] == [True, True, False] and (after[2].error or 0) > (after[2].allowed or 0)
    assert [row.median_ms for row in after] == pytest.approx([1, 1, 5])
    assert after[2].speedup == pytest.approx(0.2)


def traced(tmp_path: Path, spoil: Callable[[dict[str, Tensor]], object]) -> dict[str, Any]:
    """The trace of a small training step, whose terms `spoil` gets to see."""
    workload = build_workload(TINY)
    spoilt: Workload = replace(workload, run=lambda run=workload.run: spoil(run()))
    return profile_workload(spoilt, tmp_path, steps=3, warmup=1, with_roofline=False)


def test_nothing_is_reported_where_nothing_was_planted(tmp_path: Path) -> None:
    found = traced(tmp_path, lambda terms: None)
    assert not found["memory"]["leaking"]
    # the assignment of a CPU, which on a GPU is another one, and no other read: this also holds for the plain losses,
    # of which tests/test_waiting.py cannot see what torch itself does for tensors that have data
    assert [wait["operation"] for wait in found["synchronizations"]] == ["detr_kernels::assignment_scipy"]


def test_a_leak(tmp_path: Path) -> None:
    kept: list[Tensor] = []
    found = traced(tmp_path, lambda terms: kept.append(torch.ones(1 << 20)))
    assert found["memory"]["leaking"] and found["memory"]["growth_mib_per_step"] == pytest.approx(4, rel=0.1)


def test_a_read_by_the_host(tmp_path: Path) -> None:
    plain = traced(tmp_path, lambda terms: None)
    found = traced(tmp_path, lambda terms: terms["loss"].item())
    assert found["synchronizations_per_step"] == plain["synchronizations_per_step"] + 1
    assert any("aten::item" in wait["operation"] and wait["per_step"] == 1 for wait in found["synchronizations"])
