"""`check_data` names every fault of a data set at once (fault 16), and is silent about one without."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detr_fast.check_data import CheckDataConfig, main
from detr_fast.command import run
from detr_fast.config import UserError


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
    return main(CheckDataConfig(data=str(root), **options)), capsys.readouterr().out


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
        "1.jpg: 3 targets, but 2 queries",
        "2.jpg: is 40 x 60, but the annotations say 60 x 40",
        "3.jpg: the image file is missing",
        "4.jpg: cannot be decoded",
        "category 1 'dog' is not among",
        "test.json: not valid json at line 1, column 13",
        "problems: 8",
    ):
        assert problem in text, problem


@pytest.mark.parametrize("workers", [0, 3])
def test_any_number_of_workers_finds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    write_split(tmp_path, "train", images=6)
    for i in (2, 5):
        (tmp_path / "train" / f"{i}.jpg").write_bytes(b"<html>")
    code, text = check(tmp_path, capsys, workers=workers)
    assert code == 2 and text.index("2.jpg") < text.index("5.jpg") and "problems: 2" in text


def test_harmless_defaults_are_told_but_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {key: value for key, value in annotation(0, 1, [1, 1, 9, 9]).items() if key not in ("area", "iscrowd")}
    write_split(tmp_path, "train", bare)
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
    with pytest.raises(UserError, match=r"No train split. Looked for"):
        check(tmp_path, capsys)
    code, text = check(tmp_path / "absent", capsys)
    assert code == 2 and text.count("no such folder") == 1


def test_the_command_exits_with_a_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        run(main, CheckDataConfig, argv=["--data", str(tmp_path)])
    assert ending.value.code == 2
    assert "No train split" in capsys.readouterr().err
    write_split(tmp_path, "train")
    with pytest.raises(SystemExit) as ending:
        run(main, CheckDataConfig, argv=["--data", str(tmp_path), "--num-queries", "3"])
    assert ending.value.code == 0
