"""What was measured on this machine: kept by what it depends on, used where nothing is asked for by name."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from detr_profiling.tune import TuneOptions
from rich.console import Console

from detr_fast import load_model, machine, tuning
from detr_fast.command import spelled_out
from detr_fast.config import MODELS, RuntimeOptions, TrainConfig, UserError
from detr_fast.data.coco import build_dataset
from detr_fast.data.shapes import write_split
from detr_fast.detector import Detector, place
from detr_fast.doctor import check_measured
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import OptimizedDETR
from detr_fast.paths import cache_folder
from detr_fast.runtime import choose_runtime, runtime_for_inference
from detr_fast.training import autotune
from detr_fast.training.distributed import World
from detr_fast.tuning import Case, Trial, Tuning, entry_path, find, keep

CPU = torch.device("cpu")
CONFIG = replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=1)
OPTIONS = TrainConfig()
CASE = Case.of(CONFIG, "training", 2, 320, 427, OPTIONS)
TRIALS = (
    Trial(
        switch="precision",
        value="fp32",
        verdict="won",
        ms=8.0,
        against_ms=10.0,
        iqr_ms=0.5,
        error=1e-6,
        allowed=1e-5,
    ),
    Trial(switch="compile", value=True, verdict="failed", reason="crashed: SIGSEGV"),
    Trial(switch="channels_last", value=False, verdict="not tried", reason="no time left"),
)


def make(case: Case = CASE, **choices: Any) -> Tuning:
    times = {"first_guess_ms": 10.0, "chosen_ms": 8.0, "iqr_ms": 0.5, "date": "2026-11-28"}
    return Tuning.of(CPU, case, choices, TRIALS, **times)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    return tmp_path


def test_an_entry_comes_back_as_it_was_kept() -> None:
    assert find(CPU, CASE) is None
    entry = make(precision="fp32", layer_norm="triton")
    path = keep(CPU, entry)
    assert path == entry_path(CPU, CASE)
    assert find(CPU, CASE) == entry
    assert find(CPU, CASE).parsed_trials() == list(TRIALS)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "other",
    [
        Case.of(CONFIG, "inference", 2, 320, 427, OPTIONS),
        Case.of(CONFIG, "training", 4, 320, 427, OPTIONS),
        Case.of(CONFIG, "training", 2, 800, 1066, OPTIONS),
        Case.of(replace(CONFIG, dilation=True), "training", 2, 320, 427, OPTIONS),
        Case.of(replace(CONFIG, num_queries=300), "training", 2, 320, 427, OPTIONS),
    ],
)
def test_another_case_has_no_entry(other: Case) -> None:
    keep(CPU, make())
    assert find(CPU, other) is None


def test_images_of_nearly_one_size_are_one_case() -> None:
    keep(CPU, make())
    keep(CPU, make(Case.of(CONFIG, "training", 2, 200, 400, OPTIONS), precision="fp32"))
    few_classes = replace(CONFIG, num_classes=3)
    assert find(CPU, Case.of(few_classes, "training", 2, 400, 500, OPTIONS)) == make()
    nearer = find(CPU, Case.of(few_classes, "training", 2, 200, 300, OPTIONS))
    assert nearer is not None and nearer.choices == {"precision": "fp32"}
    assert find(CPU, Case.of(few_classes, "training", 2, 100, 300, OPTIONS)) is None


@pytest.mark.parametrize(
    "asked",
    [{"precision": "fp32"}, {"compile": True}, {"channels_last": False}, {"capture": False}, {"attention": "ref"}],
)
def test_what_was_measured_without_an_option_says_nothing_of_runs_with_it(asked: dict[str, Any]) -> None:
    keep(CPU, make())
    case = Case.of(CONFIG, "training", 2, 320, 427, replace(OPTIONS, **asked))
    assert find(CPU, case) is None
    keep(CPU, make(case))
    assert find(CPU, case) is not None
    passed = list(autotune.arguments(replace(OPTIONS, batch_size=2, **asked), CONFIG, (320, 427)))
    assert tyro.cli(TuneOptions, args=list(spelled_out(passed, TuneOptions))).case() == case


def test_the_doctor_names_the_entries_that_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tune" in check_measured().follows
    keep(CPU, make())
    keep(CPU, make(Case.of_inference(CONFIG, 1, OPTIONS)))
    finding = check_measured()
    assert finding.found == "2 cases" and "8 ms a step against 10" in finding.follows
    monkeypatch.setattr(machine, "installed_version", lambda package: "9.9")
    assert check_measured().found == "nothing"


@pytest.mark.parametrize("name", ["torch", "triton", "xformers"])
def test_a_changed_version_voids_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(CPU, make())
    before = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda package: "9.9" if package == name else before(package))
    assert find(CPU, CASE) is None


def test_what_was_measured_is_void_once_any_kernel_changes() -> None:
    found = {path.name for path in machine.computing_files()}
    assert {"set_loss.py", "triton_forward.py", "attention.py", "step.py"} <= found


def test_so_do_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(CPU, make())
    monkeypatch.setattr(machine, "code_version", lambda: "another")
    assert find(CPU, CASE) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: "{",
        lambda entry: "[]",
        lambda entry: json.dumps(entry | {"choices": {"convolution": "turbo"}}),
        lambda entry: json.dumps(entry | {"choices": {"warp": True}}),
        lambda entry: json.dumps(entry | {"trials": [{"switch": "x"}]}),
        lambda entry: json.dumps({key: value for key, value in entry.items() if key != "date"}),
        lambda entry: json.dumps(entry | {"format": 0}),
        lambda entry: json.dumps(entry | {"case": {}}),
        lambda entry: json.dumps(entry | {"case": entry["case"] | {"pixels": 0}}),
    ],
)
def test_a_damaged_entry_is_ignored_and_named(damage: Any) -> None:
    path = keep(CPU, make())
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.warns(UserWarning, match=r"(?s)ignored.*Measure anew"):
        assert find(CPU, CASE) is None


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_FAST_CACHE", "/dev/null/nowhere")
    with pytest.raises(UserError, match="DETR_FAST_CACHE"):
        keep(CPU, make())


CHOSEN = {
    "precision": "fp32",
    "channels_last": False,
    "capture": True,
    "frozen_batch_norm": "ref",
    "convolution": "ref",
}


def test_auto_takes_what_was_measured_and_says_so() -> None:
    entry = make(**CHOSEN)
    runtime = choose_runtime(TrainConfig(device="cpu"), entry)
    assert (runtime.dtype, runtime.channels_last, runtime.capture) == (torch.float32, False, True)
    model = place(DETR(CONFIG), runtime)
    names = ("frozen_batch_norm", "convolution")
    assert [model.selection.backend(name, training=True) for name in names] == ["ref", "ref"]
    assert runtime.reasons["precision"] == "fp32 (measured here: won, 8 against 10 ms)"
    assert "8 ms a step against 10" in runtime.reasons["measured"] and "best of 3" in runtime.reasons["measured"]
    assert runtime.reasons["frozen batch norm"].startswith("ref (measured here")


def test_what_is_asked_for_by_name_runs() -> None:
    entry = make(**CHOSEN)
    options = TrainConfig(device="cpu", precision="bf16", channels_last=True, capture=False, attention="ref")
    runtime = choose_runtime(options, entry)
    assert (runtime.dtype, runtime.channels_last, runtime.capture) == (torch.bfloat16, True, False)
    assert place(DETR(CONFIG), runtime).selection.backend("attention", training=True) == "ref"


@pytest.mark.parametrize("options", [{"kernels": "ref"}, {"tune": False}])
def test_nothing_measured_is_used_where_it_is_not_wanted(options: dict[str, Any]) -> None:
    runtime = choose_runtime(TrainConfig(device="cpu", **options), make(**CHOSEN))
    assert runtime.channels_last and runtime.capture is None and not runtime.measured
    assert "measured" not in runtime.reasons


def test_what_cannot_run_any_more_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_fast.runtime.missing_for_compile", lambda: "there is no compiler g++")
    monkeypatch.setattr("detr_kernels.launch.why_not_triton", lambda device: "Triton needs a C compiler")
    entry = make(attention="xformers", layer_norm="triton", compile=True, frozen_batch_norm="ref")
    with pytest.warns(UserWarning, match="measured to be fastest, but") as warned:
        runtime = choose_runtime(TrainConfig(device="cpu"), entry)
    assert {str(warning.message).split(" was ")[0] for warning in warned} == {
        *("attention xformers", "layer norm triton", "compile True")
    }
    assert not runtime.compile and set(runtime.measured) == {"frozen_batch_norm"}
    place(DETR(CONFIG), runtime)


def test_inference_reads_its_own_entry() -> None:
    keep(CPU, make(Case.of_inference(CONFIG, 1, OPTIONS), precision="fp32", optimize=False))
    options = RuntimeOptions(device="cpu")
    runtime = runtime_for_inference(options, CONFIG, 1)
    assert runtime.dtype == torch.float32
    assert not isinstance(Detector(DETR(CONFIG)).optimize(runtime).network, OptimizedDETR)
    assert "measured" not in runtime_for_inference(options, CONFIG, 2).reasons


def test_a_model_loaded_to_be_fast_reads_it_as_the_commands_do(tmp_path: Path) -> None:
    keep(CPU, make(Case.of_inference(CONFIG, 1, OPTIONS), precision="fp32", channels_last=False))
    torch.save({"model": DETR(CONFIG).state_dict(), "model_config": CONFIG.to_dict()}, tmp_path / "model.pt")
    runtime = load_model(tmp_path / "model.pt", optimize=True).runtime
    assert (runtime.dtype, runtime.channels_last) == (torch.float32, False) and "measured" in runtime.reasons
    assert "measured" not in load_model(tmp_path / "model.pt").runtime.reasons


def test_switches_that_are_left_open_keep_their_flags() -> None:
    given = ["--compile", "--no-capture", "--data", "--x", "--channels-last", "False", "--no-buckets", "--no_compile"]
    assert list(spelled_out(given, TrainConfig)) == [
        *("--compile", "True", "--capture", "False", "--data", "--x", "--channels-last", "False"),
        *("--no-buckets", "--compile", "False"),
    ]


def test_a_gpu_without_an_entry_measures_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path, "train", 0, 64, 20)
    options = TrainConfig(data=str(tmp_path), model="detr_tiny", train_sizes=(64,), crop_sizes=(), batch_size=4)
    train_set, config = build_dataset(options, "train"), MODELS["detr_tiny"]
    asked: list[list[str]] = []
    monkeypatch.setattr(autotune, "measure", lambda arguments, console: asked.append(arguments) or True)
    monkeypatch.setattr(autotune, "find", lambda device, case: make(case) if asked else None)
    console = Console(quiet=True)

    def look(device: str, **changes: Any) -> Tuning | None:
        changed = replace(options, **changes)
        return autotune.find_or_measure(changed, train_set, config, torch.device(device), console)

    for quiet in ({"tune": False}, {"kernels": "ref"}, {"kernels": "triton"}):
        assert look("cuda", **quiet) is None
    assert look("cpu") is None and not asked
    assert look("cuda") == make(Case.of(config, "training", 4, 64, 64, OPTIONS))
    (arguments,) = asked
    text = " ".join(arguments)
    assert "--model detr_tiny" in text and "--size 64x64" in text and "--batch-size 4" in text and "--minutes 1" in text


def test_measuring_that_failed_is_not_paid_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path, "train", 0, 64, 20)
    options = TrainConfig(data=str(tmp_path), model="detr_tiny", train_sizes=(64,), crop_sizes=(), batch_size=4)
    times: list[int] = []
    monkeypatch.setattr(autotune, "measure", lambda arguments, console: bool(times.append(1)))
    monkeypatch.setattr(tuning, "environment", lambda device: {"device": "a GPU"})
    for _ in range(2):
        found = autotune.find_or_measure(
            options, build_dataset(options, "train"), MODELS["detr_tiny"], torch.device("cuda"), Console(quiet=True)
        )
        assert found is not None and not found.choices and "not measured" in found.summary()
    assert len(times) == 1


@pytest.mark.parametrize("began_with", [None, make(precision="fp32")])
def test_a_resumed_run_keeps_what_it_began_with(began_with: Tuning | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that was made since would change its numbers; on another machine it is looked for anew."""
    monkeypatch.setattr(autotune, "find_or_measure", lambda *_: "anew")

    def look(state: Any, **asked: Any) -> Any:
        options = TrainConfig(**asked)
        return autotune.tuning_of(state, options, None, CONFIG, CPU, World(), Console())

    stored = began_with and json.loads(json.dumps(began_with.to_dict()))
    state = SimpleNamespace(tuning=stored, options=TrainConfig())
    assert look(state) == began_with
    assert look(None) == look(state, tune=False) == look(state, kernels="ref") == "anew"
    if began_with:
        monkeypatch.setattr(machine, "installed_version", lambda package: "9.9")
        assert look(state) == "anew"


def test_a_cache_that_cannot_be_written_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path, "train", 0, 64, 20)
    options = TrainConfig(data=str(tmp_path), model="detr_tiny", train_sizes=(64,), crop_sizes=(), batch_size=4)
    train_set = build_dataset(options, "train")
    monkeypatch.setenv("DETR_FAST_CACHE", "/dev/null/nowhere")
    monkeypatch.setattr(autotune, "measure", lambda arguments, console: False)
    monkeypatch.setattr(tuning, "environment", lambda device: {"device": "a GPU"})
    console = Console(soft_wrap=True)
    found = autotune.find_or_measure(options, train_set, MODELS["detr_tiny"], torch.device("cuda"), console)
    assert found is None and "DETR_FAST_CACHE" in capsys.readouterr().out


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DETR_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert find(CPU, CASE) is None and cache_folder().parent.is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/detr_fast")


def test_measuring_that_fails_costs_no_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert not autotune.measure(["--size", "nonsense"], Console(soft_wrap=True))
    assert "Not measured (exit code 2): the first guess is taken" in capfd.readouterr().out


def test_what_training_measures_is_what_it_then_finds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring process builds the same case from its options as training from its data."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(autotune, "MINUTES", 0.01)
    monkeypatch.setattr(autotune, "GRACE_S", 600)
    config = replace(MODELS["detr_tiny"], num_classes=3, num_queries=12, encoder_layers=1, dropout=0.1)
    options = TrainConfig(model="detr_tiny", batch_size=2, device="cpu", output=str(cache / "run"), precision="fp32")
    assert autotune.measure(list(autotune.arguments(options, config, (40, 56))), Console(quiet=True))
    entry = find(CPU, Case.of(config, "training", 2, 40, 56, options))
    assert entry is not None and entry.first_guess_ms and not entry.choices
    assert (cache / "run" / "profile" / "tune.json").exists()
