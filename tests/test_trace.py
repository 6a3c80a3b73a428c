"""`python -m detr_profiling trace`: its figures on disk and on the terminal, and that it notices what goes wrong."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.fed_workload import build_fed_workload, training_options
from detr_profiling.own_workload import build_workload
from detr_profiling.pages.terminal import show
from detr_profiling.pages.trace import trace_sections
from detr_profiling.trace import TraceOptions, how_to_look, main
from detr_profiling.tracing.recording import missing_events, profile_workload, without_nan
from detr_profiling.tracing.timeline import Span, Timeline, read_timeline
from detr_profiling.workload import Workload

from detr_fast.config import UserError
from detr_fast.console import Console
from detr_fast.profiler_ranges import profiler_range

BLOCK = {
    *("machine", "workload", "steps", "step_ms", "profiled_step_ms", "ranges", "idle_fraction", "synchronizations"),
    *(
        "synchronizations_per_step",
        "launches_per_step",
        "launch_kind",
        "operators",
        "kernels",
        "memory",
        "gpu",
        "process",
    ),
    *("backends", "roofline", "problem", "trace_file", "trace_mib", "trace_unpacked_mib"),
}


def tiny_options(out: Path, **changes: Any) -> TraceOptions:
    named: dict[str, Any] = {"model": "detr_tiny", "size": "64x64", "batch_size": 2, "precision": "fp32", "threads": 1}
    return TraceOptions.of(**(named | {"device": "cpu", "steps": 2, "warmup": 1, "output": str(out)} | changes))


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return build_workload(tiny_options(Path("unused")).workload)


@pytest.fixture(scope="module")
def result(tiny: Workload, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return profile_workload(tiny, tmp_path_factory.mktemp("plain"), steps=3, warmup=1, with_roofline=False)


def tampered(workload: Workload, before: Callable[[], None]) -> Workload:
    def run() -> Any:
        before()
        return workload.run()

    return replace(workload, run=run)


def figures(workload: Workload, out: Path) -> dict[str, Any]:
    return profile_workload(workload, out, steps=3, warmup=1, with_roofline=False)


def range_ms(result: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["median_ms"] for row in result["ranges"]}


def test_the_block_is_whole_and_adds_up(result: dict[str, Any]) -> None:
    assert result.keys() == BLOCK
    assert sum(row["fraction"] for row in result["ranges"]) == pytest.approx(1)
    assert result["ranges"][0]["name"] == "data wait"
    assert result["steps"] == 3 == result["ranges"][0]["runs"] == result["profiled_step_ms"]["runs"]
    assert result["step_ms"]["runs"] == 5, "without the profiler"
    assert result["synchronizations_per_step"] == sum(row["per_step"] for row in result["synchronizations"])
    assert (result["idle_fraction"], result["gpu"], result["kernels"]) == (None, None, [])
    assert result["process"]["cpu_seconds_per_step"] > 0
    assert result["workload"]["model"] == "detr_tiny"
    assert result["backends"]["assignment"].startswith("scipy")


def test_a_slow_range_is_found(tiny: Workload, tmp_path: Path) -> None:
    def sleep() -> None:
        with profiler_range("pixels"):
            time.sleep(0.3)

    slow = figures(tampered(tiny, sleep), tmp_path)
    assert slow["step_ms"]["median"] > 300
    assert range_ms(slow)["pixels"] > 300


def test_a_leak_is_found(tiny: Workload, result: dict[str, Any], tmp_path: Path) -> None:
    kept = []
    leaking = figures(tampered(tiny, lambda: kept.append(torch.zeros(2**18))), tmp_path)["memory"]
    assert leaking["leaking"]
    assert leaking["growth_mib_per_step"] == pytest.approx(1, abs=0.1)
    assert not result["memory"]["leaking"]


def test_a_leak_of_a_graph_is_found(tiny: Workload, tmp_path: Path) -> None:
    kept = []

    weight = next(tiny.model.parameters())

    def keep() -> None:
        kept.append((weight * torch.rand(256, *weight.shape)).sum())  # a scalar, and what its gradient would need

    assert figures(tampered(tiny, keep), tmp_path)["memory"]["leaking"]


def test_a_read_is_found(tiny: Workload, result: dict[str, Any], tmp_path: Path) -> None:
    def read() -> None:
        with profiler_range("loss"):
            bool(torch.ones(1) > 0)

    waits = figures(tampered(tiny, read), tmp_path)
    assert waits["synchronizations_per_step"] == result["synchronizations_per_step"] + 1
    assert {"operation": "aten::is_nonzero", "range": "loss", "per_step": 1.0} in waits["synchronizations"]


def test_batches_of_a_data_set_are_waited_for(shapes_root: Path, tmp_path: Path) -> None:
    options = tiny_options(tmp_path, data=str(shapes_root), size="auto")
    workload = build_fed_workload(options.workload, str(shapes_root))

    def slow() -> None:
        time.sleep(0.02)
        workload.fetch()

    fed = profile_workload(replace(workload, fetch=slow), tmp_path, steps=2, warmup=1, with_roofline=False)
    assert fed["workload"]["data"] == str(shapes_root)
    assert range_ms(fed)["data wait"] > 20
    assert "data wait" not in [row["range"] for row in fed["synchronizations"]], (
        "what is read there is on the host anyway"
    )
    timeline = read_timeline(tmp_path / fed["trace_file"])
    decoded = [span for span in timeline.ranges if span.name == "data wait"]
    assert len(decoded) == 2


def test_a_size_bounds_a_data_sets_images(shapes_root: Path, tmp_path: Path) -> None:
    options = tiny_options(tmp_path, data=str(shapes_root), size="32x48")
    workload = build_fed_workload(options.workload, str(shapes_root))
    sizes: list[torch.Size] = []
    backbone = workload.model.get_submodule("backbone")
    handle = backbone.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[2:]))
    workload.fetch()
    workload.run()
    handle.remove()
    assert sizes == [(32, 32)], "square images of 64 pixels, the shorter side at 32"


def test_a_size_leaves_no_room_for_the_recipes_crops(tmp_path: Path) -> None:
    bounded = training_options(tiny_options(tmp_path, model="detr_r50", size="48x32").workload, "somewhere")
    recipe = training_options(tiny_options(tmp_path, model="detr_r50", size="auto").workload, "somewhere")
    drawn = bounded.augmentation
    assert (drawn.train_sizes, drawn.crop_sizes, bounded.dataset.max_size) == ((32,), (), 48)
    assert recipe.augmentation.crop_sizes == (400, 500, 600)
    assert bounded.network.backbone_weights == "none", "nothing is downloaded"


def test_the_command_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_options(tmp_path, mode="inference")) == 0
    stored = json.loads((tmp_path / "trace.json").read_text())
    shown = capsys.readouterr().out
    assert stored.keys() == BLOCK
    assert (tmp_path / stored["trace_file"]).stat().st_size == pytest.approx(stored["trace_mib"] * 2**20)
    names = [row["name"] for row in stored["ranges"]]
    assert "backward" not in names
    for word in (*names, "MiB in", "does not grow", "ui.perfetto.dev", str(tmp_path / "trace.json")):
        assert word in shown
    assert "detr_fast detr_tiny, inference: 2 x 64x64, on " in shown
    assert "warning" not in shown
    assert stored["roofline"] is not None


def test_a_large_trace_is_warned_about(result: dict[str, Any], tmp_path: Path) -> None:
    large = result | {"trace_unpacked_mib": 120.0}
    assert any("120 MiB" in line and "--steps" in line for line in how_to_look(large, tmp_path, snapshot=False))


def test_what_a_gpu_adds_is_shown_and_no_name_is_markup(result: dict[str, Any]) -> None:
    name = "void [bold]kernel<float>" + "x" * 300
    kernel = {"name": name, "calls": 2.0, "cpu_ms": None, "device_ms": 1.0, "fraction": 0.5}
    seen = {"mean": 321.0, "max": 654.0}
    names = ("utilisation_percent", "memory_mib", "power_watts", "sm_clock_mhz", "temperature_celsius")
    waits = result["synchronizations_per_step"]
    gpu = dict.fromkeys(names, seen) | {"energy_joules": 12.5, "throttled": ["power cap"], "memory_mib": None}
    on_gpu = result | {"idle_fraction": 0.25, "kernels": [kernel], "gpu": gpu, "launch_kind": "kernel launches"}
    console = Console(width=100, record=True)
    show(trace_sections(on_gpu), console)
    text = console.export_text()
    for word in ("idle for 25.0 %", f"synchronisations: {waits:.0f} a step", "[bold]kernel<float>"):
        assert word in text
    assert "THROTTLED: power cap" in text and re.search(r"power, W +321 +654", text)
    assert "x" * 100 not in text


def test_a_gpus_trace_without_events_of_the_gpu_is_no_whole_trace(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host_alone = Timeline([], [], [])
    kernel = Span("kernel", "kernel", (0, 7), 0, 1)
    assert missing_events(torch.device("cpu"), host_alone) is None is result["problem"]
    assert missing_events(torch.device("cuda"), replace(host_alone, device=[kernel])) is None
    problem = missing_events(torch.device("cuda"), host_alone)
    assert problem is not None and "CUPTI" in problem
    found = result | {"problem": problem}
    monkeypatch.setattr("detr_profiling.trace.profile_workload", lambda *_: found)
    assert main(tiny_options(tmp_path)) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count(f"NOT complete: {problem}") == 2, "above the tables, and as the last line"
    assert "on a CPU none does" not in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 11}, "2 to 10"),
        ({"steps": 1}, "2 to 10"),
        ({"warmup": 0}, "at least 1"),
        ({"data": "shapes:64", "mode": "inference"}, "--data"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        tiny_options(tmp_path, **wrong)


def test_a_snapshot_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory curve"):
        main(tiny_options(tmp_path, memory_snapshot=True))


def test_a_folder_that_cannot_be_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        main(tiny_options(tmp_path / "file", model="no such model"))


def test_json_has_no_nan() -> None:
    value = {"a": (1.0, float("nan")), "b": [{"c": float("inf")}], "d": "nan", "e": None}
    assert without_nan(value) == {"a": [1.0, None], "b": [{"c": None}], "d": "nan", "e": None}
