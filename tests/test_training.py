"""Whole runs on a small data set: what they leave, and that an interrupted one continues as if it had not been."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from detr_fast import load_model
from detr_fast.config import UserError
from detr_fast.evaluation.coco_metrics import ABSENT, METRICS, UNLIMITED
from detr_fast.model.detr import DETR
from detr_fast.options import SigmoidLoss, TrainOptions
from detr_fast.runtime import choose_runtime
from detr_fast.train import default_options, last_line, main
from detr_fast.training.build import make_data, make_step
from detr_fast.training.checkpoint import Progress
from detr_fast.training.criterion import SetCriterion
from detr_fast.training.distributed import World
from detr_fast.training.loop import TrainingLoop
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.recipes import RECIPES
from detr_fast.training.run_folder import RunFolder
from detr_fast.weights.container import read_container
from tests.factories import TINY

pytestmark = pytest.mark.usefixtures("unrendered")

STEPS = 12
"""Two epochs of 48 images in batches of 8."""


def options(root: Path, output: Path, **changes: Any) -> TrainOptions:
    small = {"data": str(root), "output": str(output), "epochs": 2, "batch_size": 8, "log_every": 1, "eval_every": 2}
    return RECIPES["tiny"].but(**(small | {"device": "cpu", "warmup_steps": 2} | changes))


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint, by its place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {place: tensor for key, inner in items for place, tensor in tensors(inner, f"{path}/{key}").items()}


def require_bit_equal(one: Path, other: Path) -> None:
    a, b = (read_container(folder / "checkpoints" / "last.pt") for folder in (one, other))
    assert a["progress"]["step"] == b["progress"]["step"]
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and len(first) > 100
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def losses(folder: Path) -> list[tuple[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file) if row["kind"] == "train"]


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sends this process a signal within the given step."""

    def plan(step: int, number: int) -> None:
        calls = 0
        original = MicroBatches.__call__

        def call(self: MicroBatches, batches: list) -> dict:
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), number)
            return original(self, batches)

        monkeypatch.setattr(MicroBatches, "__call__", call)

    return plan


@pytest.fixture(scope="module")
def one_epoch(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch; who writes into it copies it."""
    folder = tmp_path_factory.mktemp("one_epoch")
    assert main(options(shapes_root, folder, epochs=1)) == 0
    return folder


@pytest.fixture(scope="module")
def whole(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(options(shapes_root, folder)) == 0
    return folder


def test_a_run_leaves_what_it_promises_and_learns(shapes_root: Path, tmp_path: Path) -> None:
    with pytest.warns(match=r"unlikely to learn\. updates: 36 of 8 images"):  # of photographs, which it takes them for
        assert main(options(shapes_root, tmp_path, epochs=6, ema=0.9, lr=1e-3, lr_backbone=1e-3)) == 0
    for name in ("config.json", "metrics.csv", "evaluation.json", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert (tmp_path / name).is_file(), name
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len(list((tmp_path / "plots").glob("*.png"))) >= 3
    assert {*METRICS, *UNLIMITED} <= set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    values = [float(loss) for _, loss in losses(tmp_path)]
    assert sum(values[-6:]) < 0.98 * sum(values[:6])
    assert 0 <= json.loads((tmp_path / "evaluation.json").read_text())["AP50"] <= 1
    detector = load_model(tmp_path / "checkpoints" / "best.pt")
    assert detector.categories is not None and detector.categories[0].name == "circle"


@pytest.mark.parametrize(
    ("number", "code", "changes"),
    [
        (signal.SIGTERM, 143, {}),
        (signal.SIGINT, 130, {"accumulate": 2, "ema": 0.9, "dropout": 0.1, "workers": 1, "groups": 2, "denoise": 2}),
        (signal.SIGTERM, 143, {"model": "detr_lite", "ema": 0.9, "color_jitter": 0.5, "mosaic": 0.5, "mixup": 0.5}),
    ],
    ids=[
        "terminated in mid-epoch",
        "interrupted with accumulation, average, dropout, query sets, other workers",
        "detr_lite with colours and compositions",
    ],
)
def test_an_interrupted_run_continues_bit_equal(
    shapes_root: Path,
    tmp_path: Path,
    whole: Path,
    interrupt_at: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    changes: dict[str, Any],
) -> None:
    """docs/faults.md, rows 4, 6 and 7."""
    parted = tmp_path / "parted"
    if changes:
        whole = tmp_path / "whole"
        assert main(options(shapes_root, whole, **changes)) == 0
    with monkeypatch.context():
        interrupt_at(4, number)
        assert main(options(shapes_root, parted, **changes)) == code
    monkeypatch.undo()
    assert read_container(parted / "checkpoints" / "last.pt")["progress"]["step"] == 4
    assert main(options(shapes_root, parted, **{**changes, "resume": "auto", "workers": 0})) == 0
    require_bit_equal(whole, parted)
    assert losses(whole) == losses(parted)


def test_a_run_killed_again_and_again_ends_bit_equal(shapes_root: Path, tmp_path: Path, whole: Path) -> None:
    """docs/faults.md, rows 1 and 4: SIGKILL as soon as some checkpoint is there, and again where the next goes on."""
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "detr_fast.train", "--data", str(shapes_root), "--model", "detr_tiny"]
    command += ["--epochs", "2", "--batch-size", "8", "--log-every", "1", "--eval-every", "2", "--warmup-steps", "2"]
    command += ["--device", "cpu", "--save-every", "1", "--output", str(killed), "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for lines_before_kill in (2, 5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += "img/s" in line
            if seen == lines_before_kill:
                process.kill()
                break
        process.stdout.read()
        assert process.wait() == -signal.SIGKILL
    assert 0 < read_container(killed / "checkpoints" / "last.pt")["progress"]["step"] < STEPS
    assert main(options(shapes_root, killed, resume="auto", save_every=1)) == 0
    require_bit_equal(whole, killed)


def test_a_finished_run_has_nothing_to_do(
    shapes_root: Path, one_epoch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/faults.md, row 10."""
    before = (one_epoch / "checkpoints" / "last.pt").read_bytes()
    assert main(options(shapes_root, one_epoch, epochs=1, resume="auto")) == 0
    assert "nothing to do" in " ".join(capsys.readouterr().out.split())
    assert (one_epoch / "checkpoints" / "last.pt").read_bytes() == before


def test_a_run_without_a_batch_size_is_resumed_with_its_own(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """48 images make three updates of 16 an epoch."""
    for epochs, resume in ((1, None), (2, "auto")):
        assert main(options(shapes_root, tmp_path, epochs=epochs, batch_size=0, resume=resume)) == 0
        assert "16 x 1 accumulated x 1 processes = 16 images a step" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 6
    stored = read_container(tmp_path / "checkpoints" / "last.pt")["options"]
    assert (stored["batch_size"], stored["accumulate"], stored["effective_batch"]) == (16, 1, 16)


def test_weights_that_are_not_finite_stop_the_run_with_advice(shapes_root: Path, tmp_path: Path) -> None:
    """docs/faults.md, row 27: the matcher gets a finite substitute, the run does not go on learning from it."""
    with pytest.raises(UserError, match=r"step \d+.*--lr"):
        main(options(shapes_root, tmp_path, lr=1e30, lr_backbone=1e30, warmup_steps=0))


def test_outputs_that_keep_being_non_finite_stop_the_run(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/faults.md, row 27: a finite loss with replaced costs may pass, but not for ever."""
    monkeypatch.setattr("detr_fast.training.loop.MOST_NONFINITE_READINGS", 3)
    original = SetCriterion.forward

    def forward(self: SetCriterion, *given: Any) -> dict[str, torch.Tensor]:
        return original(self, *given) | {"nonfinite_costs": torch.tensor(2)}

    monkeypatch.setattr(SetCriterion, "forward", forward)
    with pytest.raises(UserError, match="not finite at 4 log lines"):
        main(options(shapes_root, tmp_path))


def test_fine_tuning_keeps_what_the_classes_share(
    shapes_root: Path, tmp_path: Path, one_epoch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(one_epoch / "checkpoints" / "best.pt")
    assert main(options(shapes_root, tmp_path, epochs=1, weights=weights)) == 0
    assert "kept for 6 of 6 classes" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("class_loss", get_args(SigmoidLoss))
def test_the_class_loss_that_is_asked_for_is_trained(class_loss: SigmoidLoss) -> None:
    options = RECIPES["tiny"].but(class_loss=class_loss)
    config, runtime = replace(TINY, scores="sigmoid"), choose_runtime(options.runtime.but(device="cpu"))
    step = make_step(DETR(config), options, runtime, World(), None)
    assert (step.criterion.weights.class_loss, step.criterion.costs.focal_alpha) == (class_loss, 0.25)


def test_defaults_follow_the_data_and_the_model() -> None:
    assert default_options([]).network.model == "detr_lite"
    shapes = default_options(["--data", "shapes:96"])
    found = shapes.network.model, shapes.dataset.image_size, shapes.augmentation.train_sizes
    assert found == ("detr_lite", 96, (96,))
    for arguments in (["--data", "some/folder"], ["--data", "shapes_of/mine"], ["--train-images", "some/folder"]):
        assert default_options(arguments).network.model == "detr_r50", arguments
    own = default_options(["--data", "some/folder"])
    assert (own.network.model, own.dataset.image_size) == ("detr_r50", None)
    assert (own.optimizer.epochs, own.optimizer.lr) == (300, 1e-4)


def test_a_best_checkpoint_is_for_use_and_says_so_when_resumed(one_epoch: Path) -> None:
    with pytest.raises(UserError, match=r"best\.pt.*--weights"):
        default_options(["--resume", str(one_epoch / "checkpoints" / "best.pt")])


def test_resuming_in_another_memory_order_continues_the_same_run(shapes_root: Path, tmp_path: Path) -> None:
    """A fused update reads moments as they lie in memory: those of a checkpoint have to be laid as the weights are."""
    ends, first = {}, tmp_path / "first"
    own = {"precision": "fp32", "schedule": "step", "lr": 1e-4}
    assert main(options(shapes_root, first, epochs=1, **own)) == 0
    for channels_last in (True, False):
        folder = shutil.copytree(first, tmp_path / str(channels_last))
        assert main(options(shapes_root, folder, channels_last=channels_last, resume="auto", **own)) == 0
        ends[channels_last] = read_container(folder / "checkpoints" / "last.pt")["model"]
    for name, value in ends[True].items():
        assert torch.allclose(value.float(), ends[False][name].float(), atol=2e-3), name


def test_another_folders_run_is_not_overwritten_by_resuming_into_it(
    shapes_root: Path, tmp_path: Path, one_epoch: Path
) -> None:
    other = shutil.copytree(one_epoch, tmp_path / "other")
    one = str(one_epoch / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="holds a run already"):
        main(options(shapes_root, other, resume=one))


def test_a_run_without_a_step_is_refused(shapes_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--accumulate"):
        main(options(shapes_root, tmp_path, epochs=1, accumulate=7))


def test_a_run_stopped_before_its_evaluation_makes_up_for_it(
    shapes_root: Path, tmp_path: Path, interrupt_at: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context():
        interrupt_at(STEPS, signal.SIGTERM)
        assert main(options(shapes_root, tmp_path)) == 143
    monkeypatch.undo()
    assert not (tmp_path / "evaluation.json").exists()
    assert main(options(shapes_root, tmp_path, resume="auto")) == 0
    assert (tmp_path / "evaluation.json").exists() and (tmp_path / "checkpoints" / "best.pt").exists()


def test_a_frozen_backbone_is_not_trained(shapes_root: Path, tmp_path: Path) -> None:
    assert main(options(shapes_root, tmp_path, epochs=1, lr_backbone=0.0)) == 0
    assert len(read_container(tmp_path / "checkpoints" / "last.pt")["optimizer"]["param_groups"]) == 1


def test_two_processes_leave_one_run_that_one_continues(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "detr_fast.train", "--data", str(shapes_root), "--model", "detr_tiny", "--device", "cpu"]
    command += ["--epochs", "1", "--batch-size", "4", "--log-every", "2", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 images a step" in done.stdout
    assert [step for step, _ in losses(tmp_path)] == ["2", "4", "6"]
    assert "AP" in json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("loss", "ap", "precision_recall", "detections"):
        assert Image.open(tmp_path / "plots" / f"{name}.png").width > 800
    resumed = default_options(["--resume", str(tmp_path)])
    assert main(resumed.but(resume="auto", epochs=2)) == 0
    assert "8 x 1 accumulated x 1 processes = 8 images a step" in capsys.readouterr().out
    assert [step for step, _ in losses(tmp_path)] == ["2", "4", "6", "8", "10", "12"]


def test_what_makes_validation_useless_is_said_before_the_first_step(shapes_root: Path, tmp_path: Path) -> None:
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    document["images"][4]["file_name"] = "absent.jpg"
    (tmp_path / "val.json").write_text(json.dumps({**document, "annotations": []}))
    own = {"val_images": str(shapes_root / "val"), "val_annotations": str(tmp_path / "val.json")}
    with pytest.raises(UserError, match=r"val\.json: 1 of 12 images have no file"):
        main(options(shapes_root, tmp_path / "run", **own))
    with pytest.warns(match="no object to find.*latest weights"), pytest.warns(match="1 of 12 images have no file"):
        make_data(options(shapes_root, tmp_path / "run", on_bad_image="skip", **own))
    assert not (tmp_path / "run").exists()


def evaluated(step: int, ap: float) -> Any:
    """An evaluation after `step` that found `ap`, or, where that is ABSENT, nothing to measure."""
    metrics = {"AP": ap, "AP50": ap}
    measured = {} if ap == ABSENT else metrics
    unlimited = {"AP_all_detections": 0.5}
    return SimpleNamespace(metrics=metrics, measured=measured, unlimited=unlimited, line=lambda: f"{step}: {ap}")


@pytest.mark.parametrize(
    ("aps", "best"),
    [
        ([0.1, 0.3, 0.2], 2),
        ([0.0, 0.0], 1),
        ([ABSENT, ABSENT, ABSENT], 3),  # nothing can be measured: the latest
        ([ABSENT, 0.0, ABSENT], 2),  # the validation split got objects, and lost them
    ],
)
def test_the_best_weights_are_the_latest_where_nothing_was_measured(
    tmp_path: Path, aps: list[float], best: int
) -> None:
    saved, progress = [], Progress()
    facts: Any = SimpleNamespace(save_model=lambda path, weights, step: saved.append(step))
    loop = object.__new__(TrainingLoop)
    loop.step, loop.folder, loop.log, loop.display, loop.meter = (MagicMock() for _ in range(5))
    loop.progress, loop.facts, loop.batches_per_epoch, loop._began = progress, facts, 1, 0.0
    loop.step.world.size, loop._evaluating = 1, 0.0
    loop.options = TrainOptions().but(accumulate=1)
    for progress.step, ap in enumerate(aps, 1):
        loop.evaluate = lambda ap=ap: evaluated(progress.step, ap)
        loop._evaluate()
    assert saved[-1] == best
    written = loop.log.write.call_args_list[0].args[-1]
    assert written.pop("trained_seconds") > 0
    assert written == evaluated(1, aps[0]).measured | {"AP_all_detections": 0.5}
    recommended = "see plots/" in last_line(RunFolder(tmp_path), progress)
    assert recommended == (max(aps) >= 0)
