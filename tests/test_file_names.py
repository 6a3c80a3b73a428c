"""Images are found by the names that people's files have, and those that lead out of the folder are not (fault 25)."""

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detr_fast import check_data
from detr_fast.check_data import CheckDataOptions
from detr_fast.config import UserError
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.file_names import ImageFolder
from detr_fast.options import DataOptions

NFC, NFD = (unicodedata.normalize(form, "Zürich é.jpg") for form in ("NFC", "NFD"))
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a data set whose training images have the names `files` on the disk and `names` in the json."""

    def data_set(files: list[str], names: list[str]) -> Path:
        (tmp_path / "annotations").mkdir()
        (tmp_path / "train").mkdir()
        for file in files:
            (tmp_path / "train" / file).parent.mkdir(exist_ok=True)
            Image.new("RGB", (6, 4)).save(tmp_path / "train" / file, "JPEG")
        images = [{"id": id_, "file_name": name, "width": 6, "height": 4} for id_, name in enumerate(names, 1)]
        boxes = [
            {"id": id_, "image_id": id_, "category_id": 1, "bbox": [1, 1, 3, 2]} for id_ in range(1, len(names) + 1)
        ]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
        return tmp_path

    return data_set


def training_set(root: Path, **options: object) -> CocoDataset:
    return build_dataset(DataOptions(data=str(root), image_size=4, **options), "train")


def checked(root: Path, **options: bool) -> int:
    """Return check_data's exit code for the training split alone."""
    annotations = str(root / "annotations" / "train.json")
    given = {"train_images": str(root / "train"), "train_annotations": annotations}
    return check_data.main(CheckDataOptions.of(**given, **options))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("images/1.jpg", "images\\1.jpg"),
        ("images/1.jpg", ".\\images\\1.jpg"),
        ("1.jpg", "./1.jpg"),
        (NFD, NFC),
        (NFC, NFD),
        ("a b.jpg", "a%20b.jpg"),
        (NFD, "Z%C3%BCrich%20%C3%A9.jpg"),
        ("a%20b.jpg", "a%20b.jpg"),
        ("a\\b.jpg", "a\\b.jpg"),
        ("a%00b.jpg", "a%00b.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        (f"{NFD} {NFC}", f"{NFC} {NFD}"),
        (f"{NFD} b.jpg/{NFC}", f"{NFC}%20b.jpg\\{NFC}"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf%E9.jpg"),
    ],
)
def test_a_file_is_found_however_its_name_is_spelled(make: Make, file: str, name: str) -> None:
    dataset = training_set(make([file], [name]))
    assert dataset.records[0].path.name == Path(file).name and dataset[0, 0].size == (4, 6)
    assert dataset.respelled == ({} if os.path.normpath(name) == file else {name: file})


def test_the_name_as_given_goes_first(make: Make) -> None:
    root = make(["a%20b.jpg", "a b.jpg", "c\\d.jpg", "c/d.jpg"], ["a%20b.jpg", "c\\d.jpg"])
    assert [record.path.name for record in training_set(root).records] == ["a%20b.jpg", "c\\d.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.jpg", "..\\secret.jpg", "train\\..\\..\\secret.jpg", "%2e%2e/secret.jpg", "..%5Csecret.jpg"),
        *("/secret.jpg", "\\secret.jpg", "C:\\secret.jpg", "c:/secret.jpg", "\\\\server\\share\\secret.jpg", "."),
    ],
)
@pytest.mark.parametrize("follow_links", [False, True])
def test_fault_25_no_spelling_leads_out(make: Make, name: str, follow_links: bool) -> None:
    root = make(["1.jpg"], ["1.jpg", name])
    (root / "secret.jpg").touch()
    with pytest.raises(UserError, match=r"image 2: 'file_name' .* leads out of the folder"):
        training_set(root, follow_links=follow_links)


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg"])
def test_fault_25_what_is_no_name_at_all_is_refused(make: Make, name: str) -> None:
    with pytest.raises(UserError, match=r"image 1.*no file name"):
        training_set(make(["1.jpg"], [name]))


@pytest.mark.parametrize(
    ("file", "name", "hint"),
    [
        ("001.JPG", "001.jpg", "'001.JPG' (other upper and lower case"),
        ("001.png", "001.jpg", "'001.png' (with another ending)"),
        ("a/001.jpg", "001.jpg", "'a/001.jpg' (in another folder)"),
        ("001.jpg", "b/001.jpg", "'001.jpg' (in another folder)"),
        ("001.jpg", "train/001.jpg", "'001.jpg' (without the images' folder train/ itself)"),
        ("a/001.jpg", "train/a/001.jpg", "'a/001.jpg' (without the images' folder train/ itself)"),
        ("a/001.png", "train/a/001.jpg", "'a/001.png' (with another ending)"),
        ("A b.jpg", "a%20b.jpg", "'A b.jpg' (other upper and lower case, percent signs"),
        ("other.jpg", "a%00b.jpg", "the folder has 1 files"),
        ("other.jpg", "001.jpg", "the folder has 1 files, such as 'other.jpg'"),
    ],
)
def test_fault_16_a_missing_file_leads_on_to_the_one_there_is(make: Make, file: str, name: str, hint: str) -> None:
    with pytest.raises(UserError) as raised:
        training_set(make([file], [name]))
    assert "1 of 1 images have no file" in str(raised.value) and hint in str(raised.value)


def test_fault_16_the_file_that_is_named_is_the_one_with_most_of_the_name(tmp_path: Path) -> None:
    """However many files have the same last part; what is said of each costs no look at all the others."""
    for place in range(300):
        (tmp_path / f"{place:03}").mkdir()
        (tmp_path / f"{place:03}" / "rgb.png").touch()
    folder = ImageFolder(tmp_path)
    for place in (0, 7, 299):
        assert f"there is '{place:03}/rgb.png'" in folder.find(f"data/{place:03}/rgb.png").absent
    assert "in another folder, as 299 others of this name are" in folder.find("gone/rgb.png").absent


def test_a_name_that_two_files_may_have_is_missing(make: Make) -> None:
    root = make([f"%20{NFC}", f"%20{NFD}"], [])
    assert "percent signs" in ImageFolder(root / "train").find(f" {NFC}").absent


def test_fault_16_many_missing_files_are_counted_once(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    root = make([f"{i}.JPG" for i in range(9)], [f"{i}.jpg" for i in range(9)])
    for on_bad_image in ("error", "skip"):
        with pytest.raises(UserError, match=r"9 of 9 images have no file[\s\S]*0\.jpg[\s\S]*2\.jpg") as raised:
            training_set(root, on_bad_image=on_bad_image)
        assert "3.jpg" not in str(raised.value)
    assert checked(root) == 2
    assert "problems: 1" in capsys.readouterr().out


def test_fault_12_some_missing_files_are_named_at_once_or_skipped(make: Make) -> None:
    root = make(["1.jpg", "2.JPG"], ["1.jpg", "2.jpg"])
    with pytest.raises(UserError, match=r"1 of 2 images[\s\S]*2\.JPG[\s\S]*--on-bad-image skip"):
        training_set(root)
    with pytest.raises(UserError, match=r"train/2\.jpg: the image file is missing: there is '2\.JPG'"):
        _ = training_set(root, on_bad_image="skip")[0, 1]


def linked(root: Path) -> Path:
    """A store beside the images, into which an image and a folder of images are links."""
    (root / "store").mkdir()
    Image.new("RGB", (6, 4)).save(root / "store" / "0a1b", "JPEG")
    (root / "train" / "1.jpg").symlink_to(root / "store" / "0a1b")
    (root / "train" / "up").symlink_to(root / "store")
    return root


@pytest.mark.parametrize("name", ["1.jpg", "up/0a1b", "up\\0a1b"])
def test_fault_25_a_link_out_is_named_and_followed_where_that_is_asked_for(make: Make, name: str) -> None:
    root = linked(make([], [name]))
    with pytest.raises(UserError) as raised:
        training_set(root)
    link = root / "train" / ("1.jpg" if name == "1.jpg" else "up")
    for part in ("leads out", f"{link} is a symbolic link", str(root / "store" / "0a1b"), "--follow-links", "cp -rL"):
        assert part in str(raised.value)
    assert checked(root) == 2
    assert training_set(root, follow_links=True)[0, 0].size == (4, 6)
    assert checked(root, follow_links=True) == 0


def test_a_followed_link_is_no_way_to_the_folder_above_it(make: Make) -> None:
    root = linked(make([], ["up/../annotations/train.json"]))
    with pytest.raises(UserError, match=r"train/annotations/train\.json: the image file is missing"):
        training_set(root, follow_links=True)


@pytest.mark.parametrize("follow_links", [False, True])
def test_links_to_nothing_and_in_circles_are_named(make: Make, follow_links: bool) -> None:
    root = make([], ["1.jpg", "2.jpg"])
    (root / "train" / "1.jpg").symlink_to("../../.git/annex/objects/1")
    (root / "train" / "2.jpg").symlink_to("2.jpg")
    with pytest.raises(UserError) as raised:
        training_set(root, follow_links=follow_links)
    for part in ("annex/objects/1, which is not there: fetch the data (dvc pull, git annex get)", "back to itself"):
        assert part in str(raised.value)


def test_what_may_not_be_looked_at_is_told_by_whoever_opens_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ImageFolder(make(["a/1.jpg"], []) / "train")

    def refuse(path: str, **_: object) -> os.stat_result:
        raise PermissionError("Permission denied")

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, refuse)
    assert folder.find("a/1.jpg").absent == ""


def test_an_image_that_is_there_costs_one_call(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make([f"a/{i}.jpg" for i in range(9)], [])
    folder, calls = ImageFolder(root / "train"), []
    folder.find("a/0.jpg")
    for name in ("stat", "lstat", "readlink", "scandir"):
        asked = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, asked=asked, **more: calls.append(given) or asked(*given, **more))
    for i in range(9):
        folder.find(f"a/{i}.jpg")
    assert len(calls) == 9
