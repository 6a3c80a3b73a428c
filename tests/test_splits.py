"""Where a data set's splits lie: in known layouts, or in folders given one by one."""

import json
from pathlib import Path

import pytest

from detr_fast.config import UserError
from detr_fast.data.coco import build_dataset
from detr_fast.data.splits import find_split
from detr_fast.options import DataOptions, TrainOptions
from tests.coco_files import document


def make_root(root: Path, *places: tuple[str, str]) -> Path:
    """Folders of images and annotation files, both relative to `root`."""
    for images, file in places:
        (root / images).mkdir(parents=True)
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(json.dumps(document()))
    return root


def test_splits_in_both_layouts(tmp_path: Path) -> None:
    plain = make_root(tmp_path / "plain", ("train", "annotations/train.json"), ("val", "annotations/val.json"))
    assert find_split(DataOptions(data=str(plain)), "train") == (plain / "train", plain / "annotations/train.json")
    assert find_split(DataOptions(data=str(plain)), "test") is None
    coco = make_root(tmp_path / "coco", ("val2017", "annotations/instances_val2017.json"))
    assert find_split(DataOptions(data=str(coco)), "val") == (
        coco / "val2017",
        coco / "annotations/instances_val2017.json",
    )
    with pytest.raises(UserError, match=r"No train split.*train.json.*instances_train2017.json.*--train-images"):
        build_dataset(TrainOptions.of(data=str(coco)), "train")


def test_test_stands_in_for_val_and_says_so(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", ("train", "annotations/train.json"), ("test", "annotations/test.json"))
    with pytest.warns(UserWarning, match="test split is used"):
        assert find_split(DataOptions(data=str(root)), "val") == (root / "test", root / "annotations/test.json")


def test_explicit_folders_go_first_and_never_mix_with_the_embedded_data(tmp_path: Path) -> None:
    root = make_root(tmp_path, ("pictures", "a.json"))
    options = DataOptions(train_images=str(root / "pictures"), train_annotations=str(root / "a.json"))
    assert find_split(options, "train") == (root / "pictures", root / "a.json")
    assert find_split(options, "val") is None
    with pytest.raises(UserError, match="--val-images nowhere"):
        find_split(DataOptions(val_images="nowhere", val_annotations=str(root / "a.json")), "val")
    with pytest.raises(UserError, match=r"--val-annotations nowhere"):
        find_split(DataOptions(val_images=str(root), val_annotations="nowhere"), "val")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_split(DataOptions(data=str(tmp_path / "absent")), "train")
    make_root(tmp_path, ("elsewhere", "annotations/train.json"))
    with pytest.raises(UserError, match=r"not the folder of its images, .*train"):
        find_split(DataOptions(data=str(tmp_path)), "train")
    with pytest.raises(UserError, match="'trian'"):
        find_split(DataOptions(data=str(tmp_path)), "trian")
