"""Going on with a run: what is asked for takes effect or is refused by name, and the data is known by its content."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detr_fast.config import MODELS, UserError
from detr_fast.detector import place
from detr_fast.model.detr import DETR
from detr_fast.options import TrainOptions
from detr_fast.runtime import choose_runtime
from detr_fast.train import default_options, main
from detr_fast.training import checkpoint
from detr_fast.training.batch_size import with_batches
from detr_fast.training.build import make_data, make_step
from detr_fast.training.checkpoint import TrainingState
from detr_fast.training.distributed import World
from detr_fast.training.resuming import (
    FIXED,
    ON_RESUMING,
    SAME_CONTENT,
    TAKES_EFFECT,
    changes,
    check_resumed,
    continued,
    digests,
    flag,
    located,
    options_table,
    spelt,
    stored_defaults,
)
from detr_fast.weights.container import read_container
from tests.factories import begun, state_of

pytestmark = pytest.mark.usefixtures("unrendered")

README = Path(__file__).parents[1] / "README.md"
OTHERWISE: dict[str, Any] = {
    **{
        "recipe": "small",
        "model": "detr_r50",
        "num_classes": 91,
        "num_queries": 11,
        "encoder_layers": 3,
        "decoder_layers": 1,
    },
    **{
        "token_stride": 4,
        "feature_strides": (8,),
        "size_divisible": 32,
        "token_norm": True,
        "fold_norms": True,
        "position_temperature": 20.0,
        "queries": "encoder",
    },
    **{"query_positions": "boxes", "box_refinement": True, "layer_heads": True, "scores": "sigmoid", "minutes": 3.0},
    **{"source_position": False, "weights": "some.pth", "backbone_weights": "some.pth", "seed": 7, "buckets": False},
    "muon": True,
    **{"epochs": 9, "lr": 1e-6, "lr_backbone": 0.0, "weight_decay": 0.0, "clip": 0.5, "schedule": "step", "lr_drop": 3},
    **{"warmup_steps": 1, "scale_lr": True, "ema": 0.5, "dropout": 0.2, "no_object_weight": 0.3, "train_sizes": (48,)},
    "class_loss": "varifocal",
    **{"min_visible": 0.4, "crop_sizes": (32,), "crop_range": (16, 24), "image_size": 48, "max_size": 128},
    **{"color_jitter": 0.2, "mosaic": 0.2, "mixup": 0.2, "copy_paste": 0.2, "compose_epochs": (1, 4), "device": "cuda"},
    **{"precision": "bf16", "compile": True, "channels_last": False, "kernels": "ref", "attention": "ref"},
    **{
        "tune": False,
        "capture": True,
        "checkpoint_activations": True,
        "workers": 3,
        "on_bad_image": "skip",
        "follow_links": True,
    },
    **{"groups": 2, "denoise": 1},
    **{"host_allocator": "system", "data_only": True, "profile": 7, "eval_every": 7, "log_every": 7, "save_every": 7},
}
"""For every option whose value matters on resuming, one that the run below does not have."""


def ask(state: TrainingState, processes: int = 1, **asked: Any) -> TrainOptions:
    """The options that a run resumed from `state` has, where `asked` are given."""
    options = located(stored_defaults(state, Path("last.pt"), data_asked=False).but(**asked))
    train_set, val_set, config = make_data(options)
    check_resumed(state, options, config, train_set, val_set)
    return with_batches(continued(options, state, processes), config, "cpu", processes, len(train_set))


def test_every_option_has_one_rule_and_the_readme_has_them_all() -> None:
    listed = [name for group in ON_RESUMING.values() for name in group]
    assert sorted(listed) == sorted(TrainOptions.field_types())
    assert options_table() in README.read_text()


@pytest.mark.parametrize("name", [name for name in ON_RESUMING[TAKES_EFFECT] if name not in ("output", "resume")])
def test_what_may_change_is_what_runs_and_is_told(shapes_root: Path, name: str) -> None:
    state = state_of(begun(shapes_root))
    asked = ask(state, **{name: OTHERWISE[name]})
    stored = state.options.to_dict()[name]
    assert asked.to_dict()[name] == OTHERWISE[name] != stored
    assert changes(state, asked).count("(was ") == 1
    before = spelt(name, stored)
    assert f", {spelt(name, OTHERWISE[name])} (was {before})" in changes(state, asked)


@pytest.mark.parametrize("name", ON_RESUMING[FIXED])
def test_what_may_not_change_is_refused_by_name(shapes_root: Path, name: str) -> None:
    state = state_of(begun(shapes_root))
    ask(state)
    with pytest.raises(UserError, match=rf"^--(no-)?{flag(name)[2:]}.* cannot be had on resuming.*{flag(name)[2:]}"):
        ask(state, **{name: OTHERWISE[name]} | ALONG.get(name, {}))


ALONG: dict[str, dict[str, Any]] = {
    "queries": {"query_positions": "boxes", "scores": "sigmoid"},
    "feature_strides": {"token_stride": 16},
}
"""Options that another one does not go without."""


def test_a_fixed_option_spelt_out_is_no_change(shapes_root: Path) -> None:
    config = MODELS["detr_tiny"]
    spelt = {"num_classes": 6, "num_queries": config.num_queries, "encoder_layers": config.encoder_layers}
    ask(state_of(begun(shapes_root)), **spelt)


def param_groups(options: TrainOptions, state: Any) -> tuple[Any, Any]:
    """The step's optimizer after one update, or as it goes on from `state`."""
    torch.manual_seed(0)
    model = DETR(replace(MODELS["detr_tiny"], encoder_layers=1, decoder_layers=1))
    model.backbone.requires_grad_(options.optimizer.lr_backbone > 0)
    runtime = choose_runtime(options.runtime)
    step = make_step(place(model, runtime), options, runtime, World(), state)
    if state is None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        step.optimizer.step()
    return step, step.optimizer.param_groups


def test_the_optimizer_goes_on_with_the_rates_that_are_asked_for(tmp_path: Path) -> None:
    """With a backbone that is frozen or thawed on the way, and an average that begins or ends, too."""
    trained = TrainOptions.of(model="detr_tiny", batch_size=8, accumulate=1, device="cpu", precision="fp32", ema=0.9)
    for before in (trained, trained.but(lr_backbone=0.0, ema=0.0)):
        step, _ = param_groups(before, None)
        average = step.ema.state_dict() if step.ema else None
        state = SimpleNamespace(optimizer=step.optimizer.state_dict(), scaler={}, ema=average)
        for asked in (
            before.but(lr=7e-6, lr_backbone=3e-6, weight_decay=0.5, ema=0.5),
            before.but(lr=7e-6, lr_backbone=0.0, weight_decay=0.5, ema=0.0),
        ):
            resumed, groups = param_groups(asked, state)
            assert [group["base_lr"] for group in groups] == [7e-6, 3e-6][: len(groups)]
            assert [group["lr"] for group in groups] == [7e-6, 3e-6][: len(groups)]
            assert {group["weight_decay"] for group in groups} == {0.5}
            for parameter, moments in resumed.optimizer.state.items():
                assert moments["step"] == 1 and moments["exp_avg"].shape == parameter.shape
            kept = min(len(groups), len(state.optimizer["param_groups"]))
            assert len(resumed.optimizer.state) == sum(len(group["params"]) for group in groups[:kept])
            assert (resumed.ema is not None) == (asked.optimizer.ema > 0)


@pytest.mark.parametrize(
    ("processes", "asked", "expected"),
    [
        (2, {}, (8, 2)),
        (1, {}, (16, 2)),
        (4, {}, (4, 2)),
        (2, {"batch_size": 4}, (4, 4)),
        (2, {"accumulate": 1}, (16, 1)),
        (2, {"batch_size": 16, "accumulate": 1}, (16, 1)),
        (2, {"batch_size": 0, "accumulate": 0}, (8, 2)),
        (2, {"batch_size": 8}, (8, 2)),
        (2, {"batch_size": 8, "accumulate": 2, "effective_batch": 32}, (8, 2)),
        (4, {"batch_size": 8}, (8, 1)),
        (4, {"batch_size": 8, "accumulate": 2}, None),
        (2, {"effective_batch": 32}, (8, 2)),
        (32, {}, (1, 1)),
        (3, {}, None),
        (2, {"batch_size": 5}, None),
        (2, {"batch_size": 16}, (16, 1)),
        (2, {"batch_size": 4, "accumulate": 3}, None),
        (2, {"effective_batch": 64}, None),
    ],
)
def test_an_update_keeps_its_images(
    shapes_root: Path, processes: int, asked: dict[str, int], expected: tuple[int, int] | None
) -> None:
    """A run of 8 images x 2 accumulated x 2 processes; its steps are counted in updates."""
    state = state_of(begun(shapes_root, accumulate=2), processes=2)
    if expected is None:
        with pytest.raises(UserError, match=r"has 32 images an update.*Give"):
            ask(state, processes, **asked)
    else:
        resumed = ask(state, processes, **asked)
        assert (resumed.optimizer.batch_size, resumed.optimizer.accumulate) == expected


def rewritten(root: Path, into: Path, change: Callable[[dict[str, Any], str], object]) -> Path:
    shutil.copytree(root, into)
    for split in ("train", "val"):
        file = into / "annotations" / f"{split}.json"
        document = json.loads(file.read_text())
        change(document, split)
        file.write_text(json.dumps(document, indent=1))
    return into


def renumber(document: dict[str, Any], split: str) -> None:
    for row in (*document["categories"], *document["annotations"]):
        row["category_id" if "category_id" in row else "id"] = row.get("category_id", row["id"]) % 6 + 1


def rename(document: dict[str, Any], split: str) -> None:
    document["categories"][0]["name"] = "disc"


def with_another_class(document: dict[str, Any], split: str) -> None:
    document["categories"].append({"id": 7, "name": "heptagon"})


def moved_box(document: dict[str, Any], split: str) -> None:
    document["annotations"][5]["bbox"][0] += split == "val"


def fewer_images(document: dict[str, Any], split: str) -> None:
    gone = document["images"].pop()["id"]
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] != gone]


def other_names_of_files(document: dict[str, Any], split: str) -> None:
    for number, row in enumerate(document["images"]):
        row["file_name"] = f"../{split}/{row['file_name']}" if number % 2 else f"./{row['file_name']}"
    for row in document["annotations"]:
        row["id"] += 100
    for rows in document.values():
        rows.reverse()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renumber, r"The run has 1 'circle', 2 'square', .* where the data has 1 'ring', 2 'circle'.*--weights"),
        (rename, r"1 'circle' where the data has 1 'disc'"),
        (with_another_class, "where the data has 7 'heptagon'"),
        (moved_box, r"the val split is not .* has 12 images with \d+ objects, others than the run's"),
        (fewer_images, r"the train split is not .* has 47 images with .* the run's has 48 images"),
        (other_names_of_files, None),
    ],
)
def test_data_is_known_by_its_classes_and_content(
    shapes_root: Path, tmp_path: Path, change: Callable[[dict[str, Any], str], object], told: str | None
) -> None:
    state, other = state_of(begun(shapes_root)), str(rewritten(shapes_root, tmp_path / "other", change))
    if told is None:
        assert ask(state, data=other).dataset.data == other
    else:
        with pytest.raises(UserError, match=told):
            ask(state, data=other)


def test_the_content_tells_what_evaluation_reads_as_well(shapes_root: Path, tmp_path: Path) -> None:
    def crowds(document: dict[str, Any], split: str) -> None:
        document["annotations"][0]["iscrowd"] = 1

    other = begun(shapes_root).but(data=str(rewritten(shapes_root, tmp_path / "other", crowds)))
    one, two = (digests(*make_data(options)[:2]) for options in (begun(shapes_root), other))
    assert all(one[split].digest != two[split].digest for split in ("train", "val"))


def test_what_a_resumed_run_takes_for_granted(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own options; its folder where it lies now; and with another --data none of the folders given before."""
    place = tmp_path / "moved" / "checkpoints" / "last.pt"
    images, file = str(shapes_root / "train"), str(shapes_root / "annotations" / "train.json")
    stored = begun(shapes_root, output="gone", lr=3e-4, train_images=images, train_annotations=file)
    state = replace(state_of(begun(shapes_root)), options=stored)
    kept = stored_defaults(state, place, data_asked=False)
    assert (kept.optimizer.lr, kept.output, kept.dataset.train_images) == (3e-4, str(tmp_path / "moved"), images)
    elsewhere = stored_defaults(state, place, True).to_dict()
    assert {elsewhere[name] for name in ON_RESUMING[SAME_CONTENT][1:]} == {None}
    assert stored_defaults(state, tmp_path / "copied.pt", False).output == "gone"
    (tmp_path / "moved" / "checkpoints").mkdir(parents=True)
    for here, output in (("moved/checkpoints", ".."), ("moved", "."), (".", "moved")):
        monkeypatch.chdir(tmp_path / here)
        assert stored_defaults(state, Path(os.path.relpath(place)), False).output == output


def test_stored_paths_hold_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    options = located(TrainOptions.of(data="base/", weights="w.pth", backbone_weights="imagenet", output="runs/one"))
    assert (options.dataset.data, options.network.weights) == (str(tmp_path / "base"), str(tmp_path / "w.pth"))
    assert (options.network.backbone_weights, options.output) == ("imagenet", "runs/one")
    assert located(TrainOptions.of(data="shapes:64")).dataset.data == "shapes:64"


def test_weights_that_are_not_read_any_more_may_lie_elsewhere(shapes_root: Path) -> None:
    state = state_of(begun(shapes_root, weights="/there/w.pth"))
    ask(state, weights="here/w.pth")
    with pytest.raises(UserError, match=r"--weights other\.pth cannot be had .* has --weights w\.pth"):
        ask(state, weights="here/other.pth")


def test_the_advice_for_a_new_run_makes_one(shapes_root: Path, tmp_path: Path) -> None:
    """Of every refusal: without --resume, with the weights that it names and another output."""
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert main(begun(shapes_root, output=str(tmp_path / "run"))) == 0
    fewer = rewritten(shapes_root, tmp_path / "fewer", fewer_images)
    for number, asked in enumerate(({"seed": 7}, {"batch_size": 5}, {"data": str(fewer)})):
        refused = default_options(["--resume", str(last)]).but(resume=str(last), **asked)
        with pytest.raises(UserError) as told:
            main(refused)
        new = begun(shapes_root, output=str(tmp_path / str(number))).but(**asked)
        words = str(told.value).split("--weights ")
        for word in ("leave --resume out", "another --output"):
            assert word in words[0] or number == 1
        assert main(new.but(weights=words[1].rstrip(".") if len(words) > 1 else None)) == 0


def test_a_finished_run_makes_up_for_what_was_not_written(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(begun(shapes_root, output=str(tmp_path))) == 0
    read: list[Path] = []
    monkeypatch.setattr(checkpoint, "read_container", lambda path: read.append(path) or read_container(path))
    resumed = default_options(["--resume", str(tmp_path)]).but(resume="auto")
    evaluation, last = tmp_path / "evaluation.json", tmp_path / "checkpoints" / "last.pt"
    step = read_container(last)["progress"]["step"]
    evaluation.unlink()
    assert main(resumed) == 0 and evaluation.exists()
    assert len(read) == 1  # by the command for its options, and by its run
    evaluation.write_text("old")
    assert main(resumed) == 0 and evaluation.read_text() == "old"
    assert main(resumed.but(image_size=48)) == 0 and evaluation.read_text() != "old"
    assert read_container(last)["progress"]["step"] == step


def test_a_run_goes_on_as_asked_from_another_folder(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun on a relative path; resumed elsewhere, on the same data copied, at another rate and evaluated larger."""
    shutil.copytree(shapes_root, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    first = begun(Path("base"), output="run", log_every=3, schedule="step", eval_every=1)
    assert main(first) == 0
    best = read_container(run / "checkpoints" / "best.pt")["step"]
    (tmp_path / "base").rename(tmp_path / "copy")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    argv = ["--resume", "../run", "--data", "../copy"]
    resumed = default_options(argv).but(data="../copy", resume=argv[1], epochs=2, lr=1e-6, image_size=48)
    assert main(resumed) == 0
    assert "resumed after step 6, --epochs 2 (was --epochs 1), --lr 1e-06 (was --lr 0.0005)" in capsys.readouterr().out
    with (run / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["kind"] == "train"]
    assert rates[-2:] == [1e-6, 1e-6] and rates[0] > 1e-4
    stored = json.loads((run / "config.json").read_text())["options"]
    assert (stored["lr"], stored["data"]) == (1e-6, str(tmp_path / "else" / "../copy"))
    assert read_container(run / "checkpoints" / "last.pt")["options"]["lr"] == 1e-6
    assert read_container(run / "checkpoints" / "best.pt")["step"] == 12 > best
    with pytest.raises(UserError, match=r"--epochs 1: .* has done 12 steps, .* have 6\. Give more --epochs"):
        main(resumed.but(epochs=1))
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match="--capture"):
        main(resumed.but(epochs=3, capture=True))
    assert (run / "config.json").read_bytes() == before
