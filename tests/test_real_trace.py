"""A trace of a real step: its ranges nest as detr_fast.profiler_ranges says and add up (figures: test_timeline.py)."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.own_workload import build_workload
from detr_profiling.tracing.allocations import memory_use
from detr_profiling.tracing.breakdown import operator_usage, range_times
from detr_profiling.tracing.recording import Profiled, record
from detr_profiling.tracing.synchronizations import synchronizations
from detr_profiling.tracing.timeline import OTHER, RANGE, Timeline, read_timeline
from detr_profiling.workload import Workload, WorkloadOptions
from torch import Tensor, nn
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import profile

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
    seen: set[tuple[int, str]] = set()
    for each in traced.ranges:
        _, *around = each.outward(RANGE)
        assert (around[0].name if around else None) in PARENTS[each.name], each.name
        step = traced.step_of(each)
        assert step is not None
        outer = around[0] if around else traced.steps[step]
        assert outer.start_ns <= each.start_ns <= each.end_ns <= outer.end_ns, each.name
        seen.add((step, each.name))
    assert seen == {(step, name) for step in range(3) for name in PARENTS}


def test_ranges_are_as_often_and_as_long_as_torch_says(profiled: Profiled) -> None:
    for row in profiled.averages:
        if row.key in PARENTS:
            found = [each for each in profiled.timeline.ranges if each.name == row.key]
            assert len(found) == row.count
            assert sum(each.duration_ns for each in found) / 1e3 == pytest.approx(row.cpu_time_total), row.key


def test_torchs_own_events_still_lack_what_the_trace_is_read_for() -> None:
    """Else the reader can go: an allocation with its moment, and a range around what another thread does for it."""
    with profile(profile_memory=True, acc_events=True) as profiler:
        torch.zeros(2**10)
    rows = [(event.name, event.cpu_memory_usage) for event in profiler.events()]
    assert ("aten::empty", 2**12) in rows
    assert ("[memory]", 2**12) not in rows, "the release alone, which is in no operator"
    backward = FunctionEvent(1, "backward", thread=1, start_us=0, end_us=100, is_user_annotation=True)
    convolution = FunctionEvent(2, "aten::convolution_backward", thread=2, start_us=10, end_us=90)
    EventList([backward, convolution])._build_tree()
    assert convolution.cpu_parent is None


def test_the_split_adds_up_to_the_step(traced: Timeline) -> None:
    assert sum(row.fraction for row in range_times(traced)) == pytest.approx(1)


def test_all_work_is_in_a_range(traced: Timeline) -> None:
    """Counted, not timed: of a step's operators less than one in a hundred runs between the ranges."""
    inside = [span for span in traced.operators if traced.step_of(span) is not None]
    outside = [span.name for span in inside if traced.range_of(span) == OTHER]
    assert len(inside) > 1000 and len(outside) < 0.01 * len(inside)


def test_a_real_step_stays_as_large_and_its_peak_has_a_name(traced: Timeline) -> None:
    found = memory_use(traced)
    assert found is not None
    assert not found.leaking
    assert abs(found.growth_mib_per_step or 0) < 0.1
    assert found.peak_range in ("backward", "optimizer", "loss")
    assert found.peak_operator is not None


def test_a_read_in_the_forward_is_one_more(tiny: Workload, traced: Timeline, tmp_path: Path) -> None:
    def read(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        output.detach().sum().item()

    handle = tiny.model.get_submodule("class_embed").register_forward_hook(read)
    timeline = record(tiny, tmp_path / "trace.json", steps=2, warmup=1).timeline
    handle.remove()
    before = {(row.operation, row.range): row.per_step for row in synchronizations(traced)}
    after = {(row.operation, row.range): row.per_step for row in synchronizations(timeline)}
    assert after == before | {("aten::item", "heads"): 1}


def test_scipys_assignment_is_a_read(traced: Timeline) -> None:
    rows = [row for row in synchronizations(traced) if row.range == "matching"]
    assert [(row.operation, row.per_step) for row in rows] == [("detr_kernels::assignment_scipy", 1)]


def test_the_trace_finds_the_dearest_operators(profiled: Profiled) -> None:
    rows = operator_usage(profiled.averages, profiled.timeline)
    assert len(rows) == 25
    assert "aten::convolution_backward" in [row.name for row in rows[:5]]
    assert 0.5 < sum(row.fraction for row in rows) < 1
    assert torch.get_num_threads() == 1, "one thread, or own times of operators would hide the others'"
