"""A trace of a real step: its ranges nest as detr_fast.profiler_ranges says and add up (figures: test_timeline.py)."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.own_workload import build_workload
from detr_profiling.tracing.allocations import memory_use
from detr_profiling.tracing.breakdown import (
    operator_usage,
    stage_times,
)
from detr_profiling.tracing.recording import Profiled, record
from detr_profiling.tracing.synchronizations import synchronizations
from detr_profiling.tracing.timeline import Timeline, read_timeline
from detr_profiling.workload import Workload, WorkloadOptions
from torch import Tensor, nn

MIB = 2**20
PARENTS: dict[str, set[str | None]] = {
    **{name: {None} for name in ("data wait", "copy", "pixels", "forward", "loss", "backward", "optimizer")},
    **{name: {"forward"} for name in ("backbone", "encoder", "decoder", "heads")},
    "matching": {"loss"},
}


@pytest.fixture(scope="module")
def tiny() -> Workload:
    options = WorkloadOptions.of(
        model="detr_tiny", size="64x64", batch_size=4, device="cpu", precision="fp32", threads=1
    )
    return build_workload(options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace") / "trace.pt.json.gz"


@pytest.fixture(scope="module")
def profiled(tiny: Workload, path: Path) -> Profiled:
    found = record(tiny, path, steps=3, warmup=1)
    weights_mib = sum(parameter.nbytes for parameter in tiny.model.parameters()) / MIB
    assert 3 * weights_mib < found.before_mib < 4 * weights_mib, "weights and the optimizer's two moments, no gradients"
    return found


@pytest.fixture(scope="module")
def traced(profiled: Profiled) -> Timeline:
    return profiled.timeline


def test_the_file_is_a_chrome_trace(profiled: Profiled, path: Path) -> None:
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert {"traceEvents", "displayTimeUnit"} <= content.keys()
    complete = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert all({"name", "pid", "tid", "ts", "dur"} <= event.keys() and event["dur"] >= 0 for event in complete)
    assert len(read_timeline(path).steps) == 3 == len(profiled.timeline.steps)


def test_ranges_nest_as_the_step_does(traced: Timeline) -> None:
    timeline = traced
    seen: set[tuple[int, str]] = set()
    for stage in timeline.stages.spans:
        parent = stage.parent
        assert (parent.name if parent else None) in PARENTS[stage.name], stage.name
        step = timeline.step_at(stage.start_ns)
        assert step is not None
        around = parent or timeline.steps[step]
        assert around.start_ns <= stage.start_ns <= stage.end_ns <= around.end_ns, stage.name
        seen.add((step, stage.name))
    assert seen == {(step, name) for step in range(3) for name in PARENTS}


def test_the_split_adds_up_to_the_step(traced: Timeline) -> None:
    assert sum(row.fraction for row in stage_times(traced)) == pytest.approx(1)


def test_all_work_is_in_a_stage(traced: Timeline) -> None:
    """Counted, not timed: of a step's operators less than one in a hundred runs between the stages."""
    timeline = traced
    inside = [span for span in timeline.operators.spans if timeline.step_at(span.start_ns) is not None]
    outside = [span.name for span in inside if timeline.stage_at(span.track, span.start_ns) is None]
    assert len(inside) > 1000 and len(outside) < 0.01 * len(inside)


def test_a_real_step_stays_as_large_and_its_peak_has_a_name(traced: Timeline) -> None:
    found = memory_use(traced)
    assert found is not None
    assert not found.leaking
    assert abs(found.growth_mib_per_step or 0) < 0.1
    assert found.peak_stage in ("backward", "optimizer", "loss")
    assert found.peak_operator is not None


def test_a_read_in_the_forward_is_one_more(tiny: Workload, traced: Timeline, tmp_path: Path) -> None:
    def read(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.detach().sum().item()

    handle = tiny.model.get_submodule("class_embed").register_forward_hook(read)
    timeline = record(tiny, tmp_path / "trace.json", steps=2, warmup=1).timeline
    handle.remove()
    before = {(row.operation, row.stage): row.per_step for row in synchronizations(traced)}
    after = {(row.operation, row.stage): row.per_step for row in synchronizations(timeline)}
    assert after == before | {("aten::item", "heads"): 1}


def test_scipys_assignment_is_a_read(traced: Timeline) -> None:
    rows = [row for row in synchronizations(traced) if row.stage == "matching"]
    assert [(row.operation, row.per_step) for row in rows] == [("detr_kernels::assignment_scipy", 1)]


def test_the_trace_finds_the_dearest_operators(profiled: Profiled) -> None:
    rows = operator_usage(profiled.averages, profiled.timeline)
    assert len(rows) == 25
    assert "aten::convolution_backward" in [row.name for row in rows[:5]]
    assert 0.5 < sum(row.fraction for row in rows) < 1
    assert torch.get_num_threads() == 1, "one thread, or own times of operators would hide the others'"
