"""`check_data` names every fault of a data set at once (fault 16), and is silent about one without."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_fast.check_data import CheckDataOptions, main
from detr_fast.command import run
from detr_fast.config import UserError
from detr_fast.data.checks import warn_before_training
from detr_fast.data.coco import build_dataset
from detr_fast.options import DataOptions


def annotation(id: int, image_id: int, bbox: list[float], category_id: int = 1) -> dict[str, Any]:
    box = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox}
    return {**box, "area": bbox[2] * bbox[3], "iscrowd": 0}


def write_split(root: Path, split: str, *annotations: dict[str, Any], images: int = 2, name: str = "cat") -> None:
    """`images` images of 60 x 40 pixels with ids from 1, and one category."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(1, images + 1):
        Image.new("RGB", (60, 40), (9, 99, 9)).save(root / split / f"{i}.jpg")
    rows = [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in range(1, images + 1)]
    annotations = annotations or (annotation(1, 1, [1, 1, 9, 9]),)
    document = {"images": rows, "annotations": list(annotations), "categories": [{"id": 1, "name": name}]}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(document))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")


def check(root: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, str]:
    """The exit code and what was printed."""
    return main(CheckDataOptions.of(data=str(root), **options)), capsys.readouterr().out


def test_a_clean_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, "train", annotation(1, 1, [1, 1, 9, 9]))
    write_split(tmp_path, "val", annotation(1, 2, [1, 1, 9, 9]), images=3)
    code, text = check(tmp_path, capsys)
    assert code == 0 and "Nothing is wrong" in text
    assert "train: 2 images (1 without targets), 1 targets" in text and "val: 3 images" in text


def test_fault_16_everything_wrong_is_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [[1, 1, 9, 9], [1, 1, 0, 9], [50, 30, 30, 5], [2, 2, 9, 9]]
    write_split(tmp_path, "train", *(annotation(i, 1, box) for i, box in enumerate(boxes, 101)), images=5)
    Image.new("RGB", (40, 60)).save(tmp_path / "train" / "2.jpg")
    (tmp_path / "train" / "3.jpg").unlink()
    (tmp_path / "train" / "4.jpg").write_bytes((tmp_path / "train" / "4.jpg").read_bytes()[:300])
    write_split(tmp_path, "val", name="dog")
    write_split(tmp_path, "test")
    (tmp_path / "annotations" / "test.json").write_text('{"images": [')
    code, text = check(tmp_path, capsys, num_queries=2)
    assert code == 2
    for problem in (
        "1 boxes have no area inside their image: dropped (annotations 102)",
        "1 boxes pass their image's edge: clamped for training (annotations 103)",
        "1 images have more than 2 targets (up to 3; 1.jpg), but 2 queries",
        "2.jpg: is 40 x 60, but the annotations say 60 x 40",
        "3.jpg: the image file is missing",
        "4.jpg: cannot be decoded",
        "category 1 'dog' is not among",
        "test.json: not valid json at line 1, column 13",
        "problems: 8",
    ):
        assert problem in text, problem


BOX = annotation(1, 1, [1, 1, 9, 9])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{**BOX, "iscrowd": 1}], "nothing to train on: all 1 annotations have iscrowd 1"),
        ([annotation(1, 1, [0.2, 0.2, 0.5, 0.5])], "1 boxes look like relative ones"),
        ([BOX, {**BOX, "id": 2}], "1 annotations repeat an earlier one, its image, class and box (annotations 2)"),
        ([{**BOX, "area": 0}], "1 areas are 0"),
    ],
    ids=["crowds alone", "relative", "double", "area"],
)
def test_silent_faults_are_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], problem: str
) -> None:
    write_split(tmp_path, "train", *rows)
    code, text = check(tmp_path, capsys)
    assert code == 2 and problem in text and "Nothing is wrong" not in text


def test_an_image_listed_twice_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, "train", BOX)
    (tmp_path / "train" / "same.jpg").symlink_to(tmp_path / "train" / "2.jpg")
    file = tmp_path / "annotations" / "train.json"
    document = json.loads(file.read_text())
    document["images"].append({"id": 9, "file_name": "same.jpg", "width": 60, "height": 40})
    file.write_text(json.dumps(document))
    code, text = check(tmp_path, capsys)
    assert code == 2 and "1 image files are listed more than once" in text and "2.jpg: ids 2, 9" in text


def test_what_may_be_meant_is_told_but_no_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crowded = [annotation(i, 1, [i % 12 * 5, i // 12 * 4, 4, 4]) for i in range(120)]
    write_split(tmp_path, "train", *crowded)
    write_split(tmp_path, "val", {**BOX, "iscrowd": 1})
    exif = Image.Exif()
    exif[0x112] = 3
    for name, pixel in (("train/1.jpg", 1), ("train/2.jpg", 2), ("val/1.jpg", 2), ("val/2.jpg", 3)):
        Image.new("RGB", (60, 40), (90 * pixel, 0, 0)).save(tmp_path / name, exif=exif if pixel == 3 else b"")
    code, text = check(tmp_path, capsys, num_queries=200)
    assert code == 0 and "Nothing is wrong" in text and "to look at, though it may be meant: 4" in text
    for line in (
        "train  1 images have more than 100 objects of one class (up to 120; 1.jpg)",
        "val    there is no object to find, so that no AP can be measured: all 1 annotations have iscrowd 1",
        "val    1 images have an EXIF orientation (2.jpg: 3), which is not applied",
        "val    1 images are another split's, too (1.jpg is train's 2.jpg)",
    ):
        assert line in text, line


@pytest.mark.parametrize(
    ("most", "dtype", "told"),
    [(4095, np.uint16, 1), (255, np.int32, 1), (255, np.uint16, 1), (65535, np.uint16, 0), (65535, np.int32, 0)],
)
def test_images_of_fewer_bits_than_their_file_has_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], most: int, dtype: type, told: int
) -> None:
    write_split(tmp_path, "train")
    write_split(tmp_path, "val")
    pixels: np.ndarray = np.linspace(0, most, 40 * 60).astype(dtype).reshape(40, 60)
    Image.fromarray(pixels).save(tmp_path / "train" / "1.jpg", "TIFF")
    code, text = check(tmp_path, capsys)
    assert code == 0 and text.count("hold less than an eighth of the range (1.jpg)") == told


def test_categories_that_differ_in_case_or_id_are_named_in_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path, "train")
    write_split(tmp_path, "val", name="Cat ")
    code, text = check(tmp_path, capsys)
    assert code == 2 and "These differ in id, case or spaces alone: 1 'Cat ' and 1 'cat'" in text


def test_long_lines_are_not_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads the output, as a log or a search does, finds words that belong together in one line."""
    monkeypatch.setenv("COLUMNS", "40")
    write_split(tmp_path, "train", {**BOX, "iscrowd": 1})
    assert "there is nothing to train on: all 1 annotations have iscrowd 1" in check(tmp_path, capsys)[1]


@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_workers_finds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    write_split(tmp_path, "train", images=6)
    write_split(tmp_path, "val")
    for i in (2, 5):
        (tmp_path / "train" / f"{i}.jpg").write_bytes(b"<html>")
    filters = list(warnings.filters)
    code, text = check(tmp_path, capsys, workers=workers)
    assert warnings.filters == filters  # threads that silenced some for a moment would leave them silent
    assert code == 2 and text.index("2.jpg") < text.index("5.jpg") and "problems: 2" in text


def test_harmless_defaults_are_told_but_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {key: value for key, value in annotation(0, 1, [1, 1, 9, 9]).items() if key not in ("area", "iscrowd")}
    write_split(tmp_path, "train", bare)
    write_split(tmp_path, "val")
    code, text = check(tmp_path, capsys)
    assert code == 0
    assert "1 annotations without iscrowd" in text and "without area" in text and "renumbered" in text


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, "train")
    write_split(tmp_path, "val", name="[red]dog[/nothing]")
    assert "[red]dog[/nothing]" in check(tmp_path, capsys)[1]


def test_where_val_is_test_it_is_checked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, "train")
    write_split(tmp_path, "test")
    with pytest.warns(UserWarning, match="test split"):
        code, text = check(tmp_path, capsys)
    assert code == 0 and text.count(": 2 images") == 2


def test_no_data_set_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = check(tmp_path, capsys)
    assert code == 2 and "No train split. Looked for" in text and "No val split. Looked for" in text
    code, text = check(tmp_path / "absent", capsys)
    assert code == 2 and text.count("no such folder") == 1


def replace_by(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "broken link":
        file.symlink_to("gone")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("absent", "No {split} split. Looked for"),
        ("folder", "{split}.json: it is a folder, not a file"),
        ("broken link", "{split}.json: it is a broken link, not a file"),
    ],
)
def test_a_split_that_training_would_miss_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, kind: str, said: str
) -> None:
    for each in ("train", "val"):
        write_split(tmp_path, each)
    file = tmp_path / "annotations" / f"{split}.json"
    file.with_name(f"{split}ing.json").write_text("{}")
    replace_by(file, kind)
    code, text = check(tmp_path, capsys)
    assert code == 2 and said.format(split=split) in text and "Nothing is wrong" not in text
    assert (f"{split}ing.json" in text) == (kind == "absent")  # what there is instead
    with pytest.raises(UserError, match=re.escape(said.format(split=split))):
        build_dataset(DataOptions(data=str(tmp_path)), split)


def test_validation_on_what_was_trained_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the same folder and file, or by links to them."""
    write_split(tmp_path, "train")
    (tmp_path / "val").symlink_to("train")
    (tmp_path / "annotations" / "val.json").symlink_to("train.json")
    given = [tmp_path / "train", tmp_path / "annotations" / "train.json"]
    names = ("train_images", "train_annotations", "val_images", "val_annotations")
    twice = {name: str(path) for name, path in zip(names, given * 2, strict=True)}
    for options in ({"data": str(tmp_path)}, twice):
        assert main(CheckDataOptions.of(**options)) == 0
        assert "numbers measured on images that were trained on" in capsys.readouterr().out
        splits = [build_dataset(DataOptions(**options), split) for split in ("train", "val")]
        with pytest.warns(UserWarning, match=r"2 of 2 images are trained on, too \(1\.jpg, 2\.jpg\)"):
            warn_before_training(*splits)


def test_a_split_given_by_itself_may_be_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path, "val")
    given = {"val_images": str(tmp_path / "val"), "val_annotations": str(tmp_path / "annotations" / "val.json")}
    assert main(CheckDataOptions.of(**given)) == 0
    assert check(tmp_path, capsys)[0] == 2


def test_the_command_exits_with_a_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        run(main, CheckDataOptions, argv=["--data", str(tmp_path)])
    assert ending.value.code == 2
    assert "No train split" in capsys.readouterr().out
    for split in ("train", "val"):
        write_split(tmp_path, split)
    with pytest.raises(SystemExit) as ending:
        run(main, CheckDataOptions, argv=["--data", str(tmp_path), "--num-queries", "3"])
    assert ending.value.code == 0
