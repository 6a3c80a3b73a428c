"""COCO files as programs write them: what can be mended is, and counted; the rest is refused by id, once for all."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detr_fast.config import UserError
from detr_fast.data.annotations import LARGEST_NUMBER, Annotations, read_annotations
from detr_fast.evaluation.coco_metrics import evaluate_detections
from tests.coco_files import Write, annotation, document

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [\n  {"id": 1,', "line 2, column"),
        ("", "line 1, column 1"),
        ('{"images": [1, }', "line 1, column"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1, 2]", "is an object with images"),
        ('{"images": {}}', "'images' must be a list"),
        ('{"images": [3]}', "'images' must be a list"),
    ],
    ids=["truncated", "empty", "invalid", "nested", "list", "images no list", "image no object"],
)
def test_fault_19_broken_json_is_located(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"annotations.json.*{message}"):
        read_annotations(write(text))


def test_fault_19_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match=r"binary.json.*UTF-8"):
        read_annotations(tmp_path / "binary.json")
    with pytest.raises(UserError, match=r"absent.json.*No such file"):
        read_annotations(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "bbox", [[1, 2, math.nan, 4], [1, math.inf, 3, 4], [1, 2, 3], None, [1, 2, 3, "4"], [1, 2, 3, 10**400], "1234"]
)
def test_faults_19_and_20_a_box_that_is_no_box_names_its_annotation(write: Write, bbox: Any) -> None:
    wrong = {**annotation(77, [1, 2, 3, 4]), "bbox": bbox}
    with pytest.raises(UserError, match=r"annotation 77.*bbox"):
        read_annotations(write(document(annotation(76, [1, 2, 3, 4]), wrong)))


def test_fault_19_nan_area_names_its_annotation(write: Write) -> None:
    with pytest.raises(UserError, match=r"annotation 5.*area"):
        read_annotations(write(document(annotation(5, [1, 2, 3, 4], area=math.nan))))


def test_fault_20_boxes_without_area_are_dropped_and_counted(write: Write) -> None:
    boxes = [[5, 5, 10, 10], [5, 5, 0, 10], [5, 5, 10, -3], [70, 5, 10, 10], [-20, 5, 10, 10]]
    annotations = read_annotations(write(document(*(annotation(i, box) for i, box in enumerate(boxes, 1)))))
    assert annotations.ids.tolist() == [1]
    assert annotations.corrections.dropped_empty == (2, 3, 4, 5)
    assert "4 boxes" in annotations.corrections.lines()[0]


def test_fault_24_unlisted_category_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="annotation 4 has 99"):
        read_annotations(write(document(annotation(4, [1, 1, 9, 9], 99))))


@pytest.mark.parametrize("value", ["0", 2, None])
def test_fault_24_a_crowd_flag_that_is_none_is_refused(write: Write, value: Any) -> None:
    with pytest.raises(UserError, match="annotation 4: 'iscrowd'"):
        read_annotations(write(document(annotation(4, [1, 1, 9, 9], 1, iscrowd=value))))


def test_fault_19_a_number_beyond_all_bounds(tmp_path: Path) -> None:
    file = tmp_path / "huge.json"
    file.write_text('{"images": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match=r"huge\.json"):
        read_annotations(file)


@pytest.mark.parametrize("ids", [[0, 1], [5, 5], [-1, 2], ["a", "b"], [1.5, 2]])
def test_fault_24_unusable_annotation_ids_are_renumbered(write: Write, ids: list[Any]) -> None:
    annotations = read_annotations(write(document(*(annotation(id_, [1, 1, 9, 9]) for id_ in ids))))
    assert annotations.ids.tolist() == [1, 2] and annotations.corrections.renumbered


def test_usable_annotation_ids_stay(write: Write) -> None:
    annotations = read_annotations(write(document(annotation(900100000001, [1, 1, 9, 9]), annotation(3, [1, 1, 9, 9]))))
    assert annotations.ids.tolist() == [900100000001, 3] and not annotations.corrections.renumbered


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 1, "file_name": "1.jpg", "width": 60, "height": 40}] * 2}, "image ids must be distinct.*1"),
        ({"images": [{"id": "x", "file_name": "1.jpg", "width": 60, "height": 40}]}, "image x.*whole number"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "height": 40}]}, "image 1.*'width'"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "width": 0, "height": 40}]}, "image 1.*positive"),
        ({"images": [{"id": 8, "width": 60, "height": 40}]}, "image 8.*file_name"),
        ({"images": []}, "no images"),
        ({"categories": [{"id": 1}, {"id": 1}]}, "category ids must be distinct"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"id": -1}]}, "category -1"),
    ],
)
def test_images_and_categories_that_cannot_be_right(write: Write, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_annotations(write({**document(), **change}))


def test_annotations_of_unlisted_images_are_dropped_and_counted(write: Write) -> None:
    annotations = read_annotations(
        write(document(annotation(1, [1, 1, 9, 9], image_id=99), annotation(2, [1, 1, 9, 9])))
    )
    assert annotations.ids.tolist() == [2] and annotations.corrections.dropped_unlisted == (1,)
