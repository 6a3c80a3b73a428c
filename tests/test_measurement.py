"""One configuration in a process of its own: what comes back, and what is said where it fails."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detr_profiling.batches import batch_shapes
from detr_profiling.measuring import timing
from detr_profiling.measuring.measurement import (
    Configuration,
    eager_file,
    last_words,
    measure_in_process,
    measure_runs,
    measure_workload,
    write_references,
    write_references_in_process,
)
from detr_profiling.measuring.memory import Peak
from detr_profiling.measuring.timing import STEADY_AFTER, Timing
from detr_profiling.mixed_sizes import padding
from detr_profiling.workload import Workload, WorkloadOptions
from torch import nn

from detr_fast.config import UserError
from tests.planted_clock import PlantedClock

OPTIONS = WorkloadOptions.of(size="64x64", device="cpu", precision="fp32", objects=2, threads=1, dropout=0.0)
INFERENCE = OPTIONS.but(mode="inference")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("references")
    write_references(INFERENCE, folder)
    yield folder


def test_a_fresh_process_measures_a_training_step(tmp_path: Path) -> None:
    write_references_in_process(OPTIONS, tmp_path)
    found = measure_in_process(Configuration(OPTIONS, backends={"attention": "ref"}), runs=2, references=tmp_path)
    assert found.timing.runs == 2 and found.timing.median_ms > 0
    assert 300 < found.peak_mib < 10_000 and found.cpu_seconds_per_image > 0 and found.first_run_s > 0
    assert found.energy_j_per_image is None
    # after its runs have trained it: the weights are the initial ones again when it is compared
    assert found.close and found.error is not None and found.allowed is not None and found.error <= found.allowed


def test_of_mixed_sizes_a_steps_time_is_the_mean_over_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    options = INFERENCE.but(model="detr_tiny", size_mix="mixed", batch_size=2)
    monkeypatch.setattr("detr_profiling.measuring.measurement.measure", lambda *_, **__: Timing((100.0, 80.0)))
    for buckets in (False, True):
        each = options.but(buckets=buckets)
        found = measure_workload(Configuration(each), 2, None)
        assert found.timing.runs_ms == (25.0, 20.0)
        assert found.padding == padding(batch_shapes(each)) and (found.padding < 1.1) == buckets


def test_on_a_gpu_a_run_is_many_steps_and_the_device_is_waited_for_at_its_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []
    monkeypatch.setattr(timing, "time", PlantedClock(tick_s=1e-3))
    monkeypatch.setattr("detr_profiling.workload.choose_device", lambda _: (torch.device("cuda"), "as if"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: did.append("wait"))
    monkeypatch.setattr("detr_profiling.measuring.measurement.peak_memory", lambda _: nullcontext(Peak(7.0)))
    workload = Workload("stand-in", OPTIONS.but(device="cuda", batch_size=2), nn.Identity(), lambda: did.append("step"))
    found = measure_runs(workload, runs=3, first_run_s=1.0)
    *warm, one, two, three = "".join("." if each == "wait" else "s" for each in did).replace("..", ". .").split()
    assert warm == [".s."] * (STEADY_AFTER["cuda"] - 1), "with the first run all that is compiled or captured is there"
    assert one == two == three == f".{'s' * found.steps_a_run}." and found.steps_a_run == 50
    assert found.timing.runs == 3 and found.peak_mib == 7.0


def test_an_option_that_cannot_be_is_told_in_a_line() -> None:
    with pytest.raises(UserError, match=r"hf-eager could not be measured: .*detr_tiny has no counterpart"):
        measure_in_process(Configuration(OPTIONS.but(model="detr_tiny"), "hf-eager"), runs=1)


def test_a_failure_is_named_by_its_exception() -> None:
    advised = "Traceback:\n  ...\ntorch._inductor.exc.InductorError: ImportError: file too short\n\nSet TORCH_LOGS\n"
    assert last_words(advised) == "torch._inductor.exc.InductorError: ImportError: file too short"
    assert last_words("error: --model x: no such\n") == "error: --model x: no such" and last_words("") == ""


def test_what_takes_too_long_is_stopped() -> None:
    with pytest.raises(UserError, match="no time left"):
        measure_in_process(Configuration(OPTIONS), runs=40, limit_s=0.01)


def test_a_configuration_goes_through_text() -> None:
    configuration = Configuration(OPTIONS, "reference", {"folded": False}, tf32=False)
    assert Configuration.from_dict(configuration.to_dict()) == configuration


def test_an_error_of_one_percent_is_seen(references: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure_workload(Configuration(INFERENCE), 1, references).close
    monkeypatch.setattr("detr_fast.model.transformer.fused_add_layer_norm", wrong_layer_norm)
    wrong = measure_workload(Configuration(INFERENCE), 1, references)
    assert wrong.close is False and wrong.error is not None and wrong.allowed is not None
    assert wrong.error > wrong.allowed


def wrong_layer_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
    from detr_kernels import fused_add_layer_norm

    return fused_add_layer_norm(x, residual, 1.01 * weight, *rest)


def test_a_row_is_judged_by_what_multiplies_as_it_does() -> None:
    cuda = OPTIONS.but(device="cuda")
    expected = {
        "fp32.pt": [Configuration(OPTIONS), Configuration(cuda, tf32=False)],
        "tf32.pt": [Configuration(cuda)],
        "bf16.pt": [Configuration(OPTIONS.but(precision="bf16")), Configuration(cuda.but(precision="fp16"))],
    }
    assert all(eager_file(each) == name for name, configurations in expected.items() for each in configurations)


def test_two_processes_are_one_series() -> None:
    found = measure_workload(Configuration(INFERENCE), 2, None)
    joined = found.joined(replace(found, peak_mib=found.peak_mib + 1))
    assert joined.timing.runs == 4 and joined.peak_mib == found.peak_mib + 1 and joined.error is None
