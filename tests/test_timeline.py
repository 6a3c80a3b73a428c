"""What is read out of a trace: a small one written by hand, every figure of which is computed in the comments."""

from collections import Counter
from typing import Any

import pytest
from detr_profiling.tracing.allocations import MOST_POINTS, memory_use
from detr_profiling.tracing.breakdown import (
    idle_fraction,
    kernel_usage,
    launches_per_step,
    merged,
    operator_usage,
    range_times,
)
from detr_profiling.tracing.synchronizations import synchronizations
from detr_profiling.tracing.timeline import Timeline, make_timeline
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from detr_fast.config import UserError

BASE_US = 4712729659698.125  # as large as torch's own, so that a float has just a nanosecond's place left
MAIN, AUTOGRAD, STREAM_7, STREAM_8 = (1, 1), (1, 2), (0, 7), (0, 8)
Event = dict[str, Any]


def span(name: str, kind: str, track: tuple[int, int], start_us: float, end_us: float, **args: Any) -> Event:
    place = {"pid": track[0], "tid": track[1], "ts": BASE_US + start_us, "dur": end_us - start_us}
    return {"ph": "X", "cat": kind, "name": name, "args": args, **place}


def ranges(*rows: tuple[str, float, float]) -> list[Event]:
    return [span(name, "user_annotation", MAIN, start, end) for name, start, end in rows]


def launch(name: str, track: tuple[int, int], start_us: float, correlation: int, kind: str = "cuda_runtime") -> Event:
    return span(name, kind, track, start_us, start_us + 5, correlation=correlation)


def memory(time_us: float, bytes_: int, total: int, device: int = 0, track: tuple[int, int] = MAIN) -> Event:
    args = {"Bytes": bytes_, "Total Allocated": total, "Device Type": device}
    place = {"pid": track[0], "tid": track[1], "ts": BASE_US + time_us}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "args": args, **place}


# step 2 takes 1000 us, step 3 takes 1200 us
HOST = ranges(
    ("ProfilerStep#2", 0, 1000),
    ("data wait", 10, 20),
    ("copy", 20, 60),
    ("loss", 60, 90),
    ("forward", 100, 400),
    ("backbone", 100, 250),  # from the same moment as what it is in
    ("encoder", 250, 330),
    ("loss", 400, 500),
    ("matching", 420, 470),
    ("backward", 500, 800),
    ("optimizer", 800, 850),
    ("Optimizer.step#AdamW.step", 805, 845),
    ("device wait", 860, 990),
    ("ProfilerStep#3", 1000, 2200),
    ("forward", 1100, 2100),
    ("forward", 2300, 2400),  # after the last step: nobody's
)
OPERATORS = [
    span("aten::conv2d", "cpu_op", MAIN, 115, 140),
    span("aten::cudnn_convolution", "cpu_op", MAIN, 118, 138),
    span("aten::item", "cpu_op", MAIN, 430, 465),
    span("aten::_local_scalar_dense", "cpu_op", MAIN, 432, 462),
    span("autograd::engine::evaluate_function: ConvBackward0", "cpu_op", AUTOGRAD, 590, 650),
    span("ConvBackward0", "cpu_op", AUTOGRAD, 595, 640),
]
DEVICE = [
    launch("cudaMemcpyAsync", MAIN, 30, 1),
    span("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", STREAM_8, 35, 55, correlation=1),
    launch("cudaLaunchKernel", MAIN, 120, 2),
    launch("cuLaunchKernel", MAIN, 121, 2, "cuda_driver"),  # the runtime's call makes the driver's: one launch
    span("conv", "kernel", STREAM_7, 130, 300, correlation=2),
    launch("cudaLaunchKernel", MAIN, 260, 3),
    span("gemm", "kernel", STREAM_8, 290, 400, correlation=3),  # beside conv for 10 us
    launch("cuLaunchKernelEx", MAIN, 425, 5, "cuda_driver"),
    span("assignment", "kernel", STREAM_7, 440, 450, correlation=5),
    launch("cudaMemcpyAsync", MAIN, 440, 6),
    span("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", STREAM_7, 450, 452, correlation=6),
    launch("cudaStreamSynchronize", MAIN, 450, 61),  # in the same operator as the copy before: one wait
    launch("cudaLaunchKernel", AUTOGRAD, 600, 4),  # while the main thread is in backward
    span("conv_backward", "kernel", STREAM_7, 610, 900, correlation=4),
    launch("cudaDeviceSynchronize", MAIN, 865, 62),  # the recorder's own
    launch("cudaGraphLaunch", MAIN, 1200, 8),  # one launch of two kernels
    span("conv", "kernel", STREAM_7, 1210, 1300, correlation=8),
    span("graph_b", "kernel", STREAM_7, 1300, 1400, correlation=8),
    launch("cudaStreamSynchronize", MAIN, 1500, 63),
    launch("cudaMemcpyAsync", MAIN, 1600, 9),
    span("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", STREAM_7, 1610, 1620, correlation=9),  # does not block
    launch("cudaMemcpyAsync", MAIN, 1630, 10),  # blocks, whatever its name
    span("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", STREAM_7, 1640, 1644, correlation=10),
    span("unknown", "kernel", STREAM_7, 2000, 2010, correlation=99),  # its launch is not in the trace
    span("cudaGetDevice", "cuda_runtime", MAIN, 1150, 1151),  # starts nothing
    span("unnumbered", "kernel", STREAM_8, 1220, 1230),
    launch("cudaStreamSynchronize", MAIN, 2300, 64),  # outside
]


@pytest.fixture
def gpu() -> Timeline:
    return make_timeline([*reversed(HOST), *DEVICE, *OPERATORS])  # torch orders events by kind


def test_ranges_leave_out_what_is_within_them(gpu: Timeline) -> None:
    rows = {row.name: row for row in range_times(gpu)}
    expected = {  # us in step 2 and in step 3
        "data wait": (10, 0),
        "copy": (40, 0),
        "forward": (300 - 150 - 80, 1000),
        "backbone": (150, 0),
        "encoder": (80, 0),
        "loss": (30 + 100 - 50, 0),
        "matching": (50, 0),
        "backward": (300, 0),
        "optimizer": (50, 0),
        "device wait": (130, 0),
        "other": (40, 200),
    }
    assert list(rows) == list(expected), "in the order of a step, those alone that occur"
    for name, times_us in expected.items():
        assert rows[name].timing.runs_ms == tuple(time / 1e3 for time in times_us), name
        assert rows[name].fraction == pytest.approx(sum(times_us) / 2200), name


def test_the_device_works_for_the_range_that_launched(gpu: Timeline) -> None:
    rows = {row.name: row.device_ms for row in range_times(gpu)}
    expected = {
        "copy": (20, 0),
        "backbone": (170, 0),
        "encoder": (110, 0),
        "matching": (10 + 2, 0),
        "backward": (290, 0),  # launched by autograd's thread
        "forward": (0, 90 + 100 + 10 + 4),
    }
    for name, times_us in expected.items():
        assert rows[name] == pytest.approx(sum(times_us) / 2 / 1e3), name
    assert rows["other"] == rows["device wait"] == 0


def test_what_autograd_launches_is_for_the_innermost_range_of_the_step() -> None:
    """Unless its own thread has one, as a forward pass that is computed again there."""
    again = span("encoder", "user_annotation", AUTOGRAD, 600, 700)
    operators = [span("aten::mm", "cpu_op", AUTOGRAD, start, start + 10) for start in (430, 480, 650, 750, 1050)]
    timeline = make_timeline([*HOST, again, *operators])
    names = [timeline.range_of(operator) for operator in timeline.operators]
    assert names == ["matching", "loss", "encoder", "backward", "other"]
    assert "encoder" in (row.name for row in range_times(timeline) if row.timing.runs_ms == (0.08, 0)), (
        "the step's alone"
    )


def test_idle_is_what_no_stream_uses(gpu: Timeline) -> None:
    busy_us = (20 + 270 + 12 + 290, 190 + 10 + 4 + 10)  # 130 to 400 is two kernels, 440 to 452 a kernel and a copy
    assert idle_fraction(gpu) == pytest.approx(((1 - busy_us[0] / 1000) + (1 - busy_us[1] / 1200)) / 2)
    assert merged([(5, 9), (0, 3), (1, 2), (3, 4)]) == [(0, 4), (5, 9)]


def test_a_graph_is_one_launch(gpu: Timeline) -> None:
    assert launches_per_step(gpu) == ((4 + 1) / 2, "kernel launches")


def test_waits_are_those_that_block_within_a_step(gpu: Timeline) -> None:
    found = {(row.operation, row.range): row.per_step for row in synchronizations(gpu)}
    assert found == {
        ("aten::item", "matching"): 0.5,
        ("cudaStreamSynchronize", "forward"): 0.5,
        ("cudaMemcpyAsync", "forward"): 0.5,
    }


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        ("cudaMemcpy", 1),
        ("cudaEventSynchronize", 1),
        ("cuCtxSynchronize", 1),
        ("cudaFree", 1),
        ("cudaFreeHost", 1),
        ("cudaFreeAsync", 0),
        ("cudaMemcpyAsync", 0),
        ("cudaStreamWaitEvent", 0),  # the stream waits, not the host
        ("cudaEventQuery", 0),
    ],
)
def test_which_calls_block(call: str, waits: int) -> None:
    kernel = span("kernel", "kernel", STREAM_7, 20, 30, correlation=7)
    assert len(synchronizations(make_timeline([*HOST, kernel, launch(call, MAIN, 200, 5)]))) == waits


def averages(*rows: tuple[str, float, tuple[tuple[str, float], ...]]) -> EventList:
    """torch's sums of operators, each with its time in us and the kernels that it launched, with theirs."""
    events = []
    for index, (name, us, kernels) in enumerate(rows):
        event = FunctionEvent(index, name, 1, 1e3 * index, 1e3 * index + us, stack=[], use_device="cuda")
        for kernel, kernel_us in kernels:
            event.append_kernel(kernel, 0, kernel_us)
            place: Any = {"device_type": DeviceType.CUDA, "device_index": 0, "use_device": "cuda", "stack": []}
            events.append(FunctionEvent(100 + index, kernel, 7, 1e3 * index, 1e3 * index + kernel_us, **place))
        event.is_user_annotation = name == "forward"
        events.append(event)
    found = EventList(events, use_device="cuda")
    found._build_tree()
    return found.key_averages()


def test_dearest_operators_and_kernels(gpu: Timeline) -> None:
    """Two steps: torch's sums are of both."""
    found = averages(
        ("aten::cudnn_convolution", 20, (("conv", 170),)),
        ("aten::addmm", 50, (("gemm", 110),)),
        ("ConvBackward0", 45, (("conv_backward", 290),)),
        ("aten::addmm", 30, ()),
        ("forward", 900, ()),
        ("cudaLaunchKernel", 5, ()),
        ("cuLaunchKernelEx", 5, ()),
    )
    total_us = 170 + 110 + 290
    operators = {row.name: row for row in operator_usage(found, gpu)}
    assert list(operators) == ["ConvBackward0", "aten::cudnn_convolution", "aten::addmm"], (
        "no range and no driver's call"
    )
    addmm, convolution = operators["aten::addmm"], operators["aten::cudnn_convolution"]
    assert (addmm.calls, addmm.cpu_ms, addmm.device_ms) == (1, 0.04, 0.055)
    assert (convolution.calls, convolution.cpu_ms, convolution.device_ms) == (0.5, 0.01, 0.085)
    assert convolution.fraction == pytest.approx(170 / total_us)
    kernels = kernel_usage(found, steps=2)
    assert [(row.name, row.calls, row.cpu_ms, row.device_ms) for row in kernels] == [
        *(("conv_backward", 0.5, None, 0.145), ("conv", 0.5, None, 0.085)),
        ("gemm", 0.5, None, 0.055),
    ]
    assert sum(row.fraction for row in kernels) == pytest.approx(1)


def nested(*names: str, start_us: float, track: tuple[int, int] = MAIN) -> list[Event]:
    """Operators, each within the one before."""
    return [span(name, "cpu_op", track, start_us + i, start_us + 20 - i) for i, name in enumerate(names)]


def test_reads_on_a_cpu_are_counted_once_and_named_by_where_they_are() -> None:
    item = ("aten::item", "aten::_local_scalar_dense")
    operators = [
        *nested("aten::is_nonzero", *item, start_us=120),
        *nested("aten::index", "aten::nonzero", start_us=260),
        *nested("aten::_fused_adamw_", *item, start_us=810),  # its counters are on the device beside a GPU
        *nested("aten::item", start_us=10),  # in data wait, on the host anyway
        *nested("autograd::engine::evaluate_function: ProdBackward1", "ProdBackward1", *item, start_us=600),
        *nested("detr_kernels::assignment_scipy", start_us=430),
        *nested("aten::scalar_tensor", start_us=700),
        *nested("aten::item", start_us=2320),  # after the last step
        *nested("aten::item", start_us=1010),  # in no range
    ]
    timeline = make_timeline([*HOST, *operators])
    assert {(row.operation, row.range): row.per_step for row in synchronizations(timeline)} == {
        ("aten::is_nonzero", "backbone"): 0.5,
        ("aten::index", "encoder"): 0.5,
        ("aten::item in ProdBackward1", "backward"): 0.5,
        ("detr_kernels::assignment_scipy", "matching"): 0.5,
        ("aten::item", "other"): 0.5,
    }


def test_without_a_gpu_operators_are_counted_and_nothing_is_idle() -> None:
    timeline = make_timeline([*HOST, *OPERATORS])
    assert idle_fraction(timeline) is None
    operators = operator_usage(averages(("ConvBackward0", 45, ()), ("aten::add", 22, ())), timeline)
    assert kernel_usage(averages(("ConvBackward0", 45, ())), steps=2) == []
    assert launches_per_step(timeline) == (2, "operators"), "four in step 2; autograd's nodes are none"
    assert all(row.device_ms is None for row in operators)
    assert all(row.device_ms is None for row in range_times(timeline))
    assert [row.fraction for row in operators] == [pytest.approx(45 / 2200), pytest.approx(22 / 2200)]


def test_own_ranges_named_step_will_do_and_none_will_not() -> None:
    own = [event | {"name": "step"} if "Profiler" in event["name"] else event for event in HOST]
    assert len(make_timeline(own).steps) == 2
    with pytest.raises(UserError, match=r"profiler\.step"):
        make_timeline(HOST[1:3])


MIB = 2**20


def test_memory_has_a_peak_with_a_place_and_does_not_grow() -> None:
    events = [
        memory(50, 2 * MIB, 102 * MIB),  # the process had a total of 100 MiB from another trace
        memory(130, 6 * MIB, 108 * MIB),  # in backbone, in cudnn_convolution's empty
        memory(600, -6 * MIB, 102 * MIB),
        memory(1500, 6 * MIB, 108 * MIB),
        memory(1600, -6 * MIB, 102 * MIB),
    ]
    within = [span("aten::empty", "cpu_op", MAIN, 129, 131)]
    found = memory_use(make_timeline([*HOST, *OPERATORS, *within, *reversed(events)]), before_mib=10)
    assert found is not None
    assert (found.peak_mib, found.peak_range, found.peak_operator) == (18, "backbone", "aten::cudnn_convolution")
    assert found.curve == [(0.05, 12), (0.13, 18), (0.6, 12), (1.5, 18), (1.6, 12)]
    assert (found.growth_mib_per_step, found.leaking) == (0, False)


def test_the_allocator_of_a_gpu_is_absolute_and_its_own() -> None:
    events = [memory(130, MIB, 70 * MIB, device=1), memory(140, MIB, 900 * MIB), memory(1500, MIB, 71 * MIB, device=1)]
    found = memory_use(make_timeline([*HOST, *events]), before_mib=10)
    assert found is not None
    assert (found.peak_mib, found.peak_range, found.peak_operator) == (71, "forward", None)
    assert (found.growth_mib_per_step, found.leaking) == (1, True)


@pytest.mark.parametrize(
    ("ends_mib", "growth_mib", "leaking"),
    [
        ((1, 2, 3, 4), 1, True),
        ((5, 1, 1, 1), 0, False),
        ((1, 2, 2, 3), 1, False),  # one step did not grow: it may have been a cache
        ((1, 1.01, 1.02, 1.03), 0.01, False),  # less than 16 KiB a step
        ((64, 64.02, 64.04, 64.06), 0.02, False),  # less than a thousandth of the peak
        ((3,), None, False),
    ],
)
def test_a_leak_grows_in_every_step(ends_mib: tuple[float, ...], growth_mib: float | None, leaking: bool) -> None:
    steps = ranges(*((f"ProfilerStep#{i}", 100 * i, 100 * i + 100) for i in range(len(ends_mib))))
    totals = [round(mib * MIB) for mib in ends_mib]
    events = [memory(100 * i + 50, total - ([0, *totals])[i], total) for i, total in enumerate(totals)]
    found = memory_use(make_timeline([*steps, *events]))
    assert found is not None
    assert found.growth_mib_per_step == (None if growth_mib is None else pytest.approx(growth_mib, abs=1e-6))
    assert found.leaking is leaking


def test_a_long_curve_keeps_its_extremes() -> None:
    totals = [MIB * (1 + index % 7) for index in range(12_345)]
    totals[6001], totals[6002] = 100 * MIB, 0
    events = [memory(index / 100, 0, total) for index, total in enumerate(totals)]
    found = memory_use(make_timeline([*HOST, *events]))
    assert found is not None
    heights = [mib for _, mib in found.curve]
    assert len(found.curve) <= MOST_POINTS
    assert max(heights) - min(heights) == 100
    assert [ms for ms, _ in found.curve] == sorted(ms for ms, _ in found.curve)
    assert Counter(round(mib - min(heights)) for mib in heights).most_common(2)[1][1] > 900, (
        "lows and highs of each part"
    )
