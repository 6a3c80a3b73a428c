"""Numbers in COCO files as other programs write them: whole ones are taken, the rest is refused once, with a count."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_fast.config import UserError
from detr_fast.data.annotations import LARGEST_NUMBER, Annotations, read_annotations
from detr_fast.evaluation.coco_metrics import evaluate_detections

PLACES = [
    *(("images", "id"), ("images", "width"), ("images", "height"), ("categories", "id")),
    *(("annotations", "image_id"), ("annotations", "category_id")),
]


def read_with(tmp_path: Path, part: str, key: str, value: Any) -> Annotations:
    """A file of two images with an annotation each, in which `value`, or what it makes of a number, is under `key`."""
    content: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": id_, "file_name": f"{id_}.jpg", "width": 60, "height": 40} for id_ in (1, 2)],
        "annotations": [{"id": id_, "image_id": id_, "category_id": id_, "bbox": [1, 1, 9, 9]} for id_ in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    for row in content[part]:
        row[key] = value(row[key]) if callable(value) else value
    (tmp_path / "a.json").write_text(json.dumps(content))
    return read_annotations(tmp_path / "a.json")


@pytest.mark.parametrize(("part", "key"), PLACES)
def test_whole_numbers_with_a_point_are_numbers(tmp_path: Path, part: str, key: str) -> None:
    plain, found = (read_with(tmp_path, part, key, kind) for kind in (int, float))
    assert found.document() == plain.document() and len(found.ids) == 2
    assert all(type(row[key]) is int for row in found.document()[part])


@pytest.mark.parametrize(("part", "key"), PLACES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda id_: id_ + 2**63, "too large: at most 9007199254740991"),
        (lambda id_: id_ + LARGEST_NUMBER - 1, "too large: at most 9007199254740991"),
        (str, "must be a whole number, not the text '1'"),
        (lambda id_: f"image{id_}", "must be a whole number, not the text 'image1'"),
        (None, "must be a whole number, but is null or missing"),
        (True, "must be a whole number, not True"),
        (math.nan, "must be a whole number, not nan"),
        (1.5, "must be a whole number, not 1.5"),
    ],
)
def test_what_is_no_id_is_refused_once(tmp_path: Path, part: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_with(tmp_path, part, key, value)
    if key in ("width", "height"):
        message = message.replace("'1'", "'60'" if key == "width" else "'40'").replace("image1", "image")
    assert message.rstrip("'") in str(raised.value) and f"{key!r}" in str(raised.value)
    assert "So it is with 2 of 2" in str(raised.value) and str(raised.value).count("a.json") == 1


def test_the_largest_ids_are_evaluated(tmp_path: Path) -> None:
    largest = LARGEST_NUMBER - 1
    document = read_with(tmp_path, "images", "id", int).document()
    for part, keys in {"images": ("id",), "annotations": ("image_id", "category_id"), "categories": ("id",)}.items():
        for row in document[part]:
            row.update({key: row[key] - 2 + largest for key in keys})
    (tmp_path / "largest.json").write_text(json.dumps(document))
    found = read_annotations(tmp_path / "largest.json")
    assert [image.id for image in found.images] == [largest - 1, largest]
    rows = np.array([[largest - 1, 1, 1, 9, 9, 0.9, largest - 1], [largest, 1, 1, 9, 9, 0.9, largest]], dtype=float)
    assert evaluate_detections(found.document(), rows).metrics["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("annotations", "bbox", None, "'bbox' must be four finite numbers x, y, width, height, but is null or missing"),
        (
            "annotations",
            "bbox",
            [[1, 2]] * 50_000,
            "'bbox' must be four finite numbers x, y, width, height, not [[1, 2]",
        ),
        ("annotations", "bbox", ["1", 2, 3, 4], "'bbox' must be four finite numbers x, y, width, height, not ['1', 2"),
        ("annotations", "area", "12", "'area' must be a finite number, not '12'"),
        ("annotations", "area", {"a": "b" * 10_000}, "'area' must be a finite number, not {'a': 'bbb"),
        ("annotations", "iscrowd", 2, "'iscrowd' must be 0 or 1, not 2"),
        ("annotations", "iscrowd", ["x"] * 50_000, "'iscrowd' must be 0 or 1, not ['x'"),
        ("images", "file_name", {"a": ["b"] * 50_000}, "'file_name' must be a name, not {'a': ['b'"),
        ("images", "file_name", None, "'file_name' must be a name, but is null or missing"),
        ("images", "width", 0, "'width' must be positive, not 0"),
        ("categories", "name", [["a"] * 50_000], "'name' must be text, not [['a'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_once_and_shortened(
    tmp_path: Path, part: str, key: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError) as raised:
        read_with(tmp_path, part, key, value)
    assert message in str(raised.value) and str(raised.value).endswith("So it is with 2 of 2.")
    assert len(str(raised.value)) < len(str(tmp_path)) + 300


def test_a_row_with_an_object_for_an_id_is_named_briefly(tmp_path: Path) -> None:
    read_with(tmp_path, "annotations", "id", {"a": "b" * 10_000})  # renumbered
    content = json.loads((tmp_path / "a.json").read_text())
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    content["annotations"][1] |= {"bbox": None, "segmentation": [[1, 1, 5, 1, 5, 5]]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"annotation {'a': 'b+: 'bbox' .*of a segmentation without one.*missing\.$"):
        read_annotations(tmp_path / "a.json")
    content["annotations"].pop()
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert len(read_annotations(tmp_path / "a.json").corrections.faults()[0]) < 300


@pytest.mark.parametrize("name", [None, 7])
def test_a_category_without_a_name_is_called_by_its_id(tmp_path: Path, name: int | None) -> None:
    found = read_with(tmp_path, "categories", "name", name)
    assert [category.name for category in found.categories] == (["1", "2"] if name is None else ["7", "7"])
    assert ("2 categories without a name" in "".join(found.corrections.lines())) == (name is None)


@pytest.mark.parametrize(("part", "kind"), [("images", "image"), ("categories", "category")])
def test_negative_ids_are_refused(tmp_path: Path, part: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"{kind} -1, -2: ids must not be negative"):
        read_with(tmp_path, part, "id", lambda id_: -id_)
