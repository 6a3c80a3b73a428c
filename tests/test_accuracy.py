"""Accuracy against seconds of training: what is run, how it is judged, and that a worse recipe is noticed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from detr_profiling import accuracy
from detr_profiling.accuracy import AccuracyOptions, known_runs, main, set_apart, words
from detr_profiling.pages.accuracy import AccuracyRun, accuracy_sections
from detr_profiling.pages.blocks import Table
from detr_profiling.pages.report import HTML_FILE

from detr_fast.config import UserError

STAND_IN = """
import csv, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
worse = given.get("--lr") == "0"
if given.get("--lr") == "nan":
    sys.exit("error: --lr nan is no learning rate")
folder = pathlib.Path(given["--output"])
folder.mkdir(parents=True)
with (folder / "metrics.csv").open("w") as file:
    rows = csv.writer(file)
    rows.writerow(["kind", "epoch", "step", "seconds", "trained_seconds", "AP", "AP50"])
    for step in (1, 2, 3):
        ap50 = 0.1 if worse else 0.2 * step + 0.01 * int(given["--seed"])
        rows.writerow(["val", step, step, 40 * step, 20 * step, ap50 / 2, ap50])
"""
"""Stands for `train`: its accuracy rises by 0.2 every 20 seconds of training, but at a learning rate of 0."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)

    def command(*given: Any) -> list[str]:
        return [sys.executable, str(program), *words(*given)[3:]]

    monkeypatch.setattr(accuracy, "words", command)


def options(root: Path, output: Path, **changes: Any) -> AccuracyOptions:
    asked = {"configurations": ("detr_lite", "detr_lite --lr 0"), "minutes": 1.0, "seeds": (0, 1, 2)}
    return AccuracyOptions.of(**{"data": str(root), "output": str(output), **asked, **changes})


def table(found: dict[str, Any]) -> dict[str, list[str]]:
    (section,) = accuracy_sections(found)
    (shown,) = (block for block in section.blocks if isinstance(block, Table))
    return {row[0].text: [cell.text for cell in row[1:]] for row in shown.rows}


def test_a_planted_worse_recipe_is_noticed(shapes_root: Path, tmp_path: Path, stand_in: None) -> None:
    assert main(options(shapes_root, tmp_path)) == 0
    found = json.loads((tmp_path / "accuracy.json").read_text())
    first, worse = table(found).values()
    assert first[-1] == "" and worse[-1] == "worse"
    assert first[2] == "0.610 (0.600 to 0.620)" and worse[2] == "0.100 (0.100 to 0.100)"
    assert "detr_lite --lr 0" in (tmp_path / HTML_FILE).read_text()


def test_the_same_recipe_under_another_name_is_no_difference(shapes_root: Path, tmp_path: Path, stand_in: None) -> None:
    assert main(options(shapes_root, tmp_path, configurations=("detr_lite", "detr_lite --lr 1"))) == 0
    _, other = table(json.loads((tmp_path / "accuracy.json").read_text())).values()
    assert other[-1] == "within the seeds' range"


def test_runs_are_kept_and_one_that_failed_is_made_again(shapes_root: Path, tmp_path: Path, stand_in: None) -> None:
    asked = options(shapes_root, tmp_path, configurations=("detr_lite", "detr_lite --lr nan"), seeds=(0,))
    assert main(asked) == 1
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert [run["note"] for run in found["runs"]] == ["", "exit code 1: error: --lr nan is no learning rate"]
    assert len(table(found)["detr_lite --lr nan"]) == 7  # its row stands, without figures
    kept = (tmp_path / "runs" / "0 detr_lite").stat().st_mtime_ns
    assert main(options(shapes_root, tmp_path, seeds=(0,))) == 0
    assert (tmp_path / "runs" / "0 detr_lite").stat().st_mtime_ns == kept
    about = {"data": str(shapes_root), "val_fraction": 0.2, "minutes": 2.0}
    with pytest.raises(UserError, match=r"has runs with minutes 1.0, not 2.0: give another --output"):
        known_runs(tmp_path, about)


def test_a_part_of_the_training_images_judges(shapes_root: Path, tmp_path: Path) -> None:
    place = set_apart(options(shapes_root, tmp_path, val_fraction=0.25))
    assert place.train_annotations and place.val_annotations and place.train_images == place.val_images
    train, val = (json.loads(Path(file).read_text()) for file in (place.train_annotations, place.val_annotations))
    ids = [{image["id"] for image in split["images"]} for split in (train, val)]
    assert [len(each) for each in ids] == [36, 12] and not ids[0] & ids[1]
    for split, own in zip((train, val), ids, strict=True):
        assert {each["image_id"] for each in split["annotations"]} <= own and split["categories"]
    assert set_apart(options(shapes_root, tmp_path / "b", val_fraction=0.25)).to_dict() != place.to_dict()
    again = json.loads((tmp_path / "b" / "data" / "val.json").read_text())
    assert again == val  # the same images every time
    assert set_apart(options(shapes_root, tmp_path, val_fraction=0.0)).train_images is None
    with pytest.raises(UserError, match=r"too few images for --val-fraction 0\.001"):
        set_apart(options(shapes_root, tmp_path, val_fraction=0.001))


def test_a_value_holds_until_the_next_evaluation() -> None:
    run = AccuracyRun("detr_lite", 0, 1.0, ((15.0, 0.1, 0.2), (45.0, 0.3, 0.6)))
    assert [run.at(seconds) for seconds in (10, 15, 44, 45, 60)] == [0.0, 0.2, 0.2, 0.6, 0.6]
    assert run.area() == pytest.approx((30 * 0.2 + 15 * 0.6) / 60) and run.final(1) == 0.3


@pytest.mark.parametrize(
    ("configuration", "module"),
    [("detr_lite --lr 1e-3", "detr_fast.train"), ("fasterrcnn", "detr_profiling.baselines.faster_rcnn_training")],
)
def test_what_is_run_is_the_command_itself(shapes_root: Path, tmp_path: Path, configuration: str, module: str) -> None:
    asked = options(shapes_root, tmp_path)
    line = words(configuration, set_apart(asked), 7, asked, tmp_path / "run")
    assert line[1:3] == ["-m", module] and "--data" not in line
    given = dict(zip(line[3::2], line[4::2], strict=True))
    assert (given["--seed"], given["--minutes"], given["--output"]) == ("7", "1.0", str(tmp_path / "run"))
    assert given["--train-annotations"].endswith("train.json") and given.get("--lr") in ("1e-3", None)


def test_the_referee_trains_and_is_judged(shapes_root: Path, tmp_path: Path) -> None:
    """A second of it: its first evaluation is written as `train` writes them."""
    asked = options(shapes_root, tmp_path, configurations=("fasterrcnn",), seeds=(0,), minutes=0.02)
    assert main(asked) == 0
    ((seconds, ap, ap50),) = json.loads((tmp_path / "accuracy.json").read_text())["runs"][0]["points"][-1:]
    assert seconds >= 1.2 and 0 <= ap <= ap50 <= 1
