"""What is silently wrong with data is found, each kind in all its forms, and nothing is said of data that are right."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_fast.check_data import check_categories
from detr_fast.config import UserError
from detr_fast.data.annotations import Annotations, Category, read_annotations
from detr_fast.data.box_formats import likely_formats
from detr_fast.data.categories import label_map
from detr_fast.data.checks import beyond_coco, check_files, class_notes, warn_before_training, without_objects
from detr_fast.data.coco import CocoDataset
from detr_fast.data.duplicates import find_duplicates
from detr_fast.data.headers import UPRIGHT, orientation_of, read_header
from detr_fast.data.transforms import EvaluationTransform

WIDTH, HEIGHT = 640, 480


def boxes_xywh(count: int, seed: int = 0) -> np.ndarray:
    """Boxes (N, 4) inside an image of WIDTH x HEIGHT, of the sizes that COCO's have."""
    rng = np.random.default_rng(seed)
    side = np.array([WIDTH, HEIGHT])
    extent = (rng.exponential(0.15, (count, 2)) * side).clip(2, side)
    return np.hstack((rng.uniform(0, side - extent), extent))


def in_form(boxes: np.ndarray, order: str, unit: float | None) -> np.ndarray:
    low, extent = np.split(boxes, 2, axis=1)
    orders = {"corners": (low, low + extent), "centre": (low + extent / 2, extent), "coco": (low, extent)}
    whole = 1 if unit is None else np.array([WIDTH, HEIGHT] * 2) / unit
    return np.hstack(orders[order]) / whole


def forms_of(boxes: np.ndarray, side: tuple[int, int] = (WIDTH, HEIGHT)) -> list[tuple[str, int]]:
    found = likely_formats(boxes, np.tile(side, (len(boxes), 1)))
    return [(words, int(which.sum())) for words, which in found]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("order", "unit", "words"),
    [
        ("corners", None, "x0, y0, x1, y1"),
        ("centre", None, "centre x, centre y, width, height"),
        ("coco", 1, "relative ones (0 to 1, as YOLO has them)"),
        ("corners", 1, "relative x0, y0, x1, y1 (0 to 1)"),
        ("centre", 1, "relative centre x, centre y, width, height (0 to 1)"),
        ("coco", 100, "x, y, width, height in percent of the image"),
        ("corners", 100, "x0, y0, x1, y1 in percent of the image"),
    ],
)
def test_another_form_of_boxes_is_told(order: str, unit: float | None, words: str, seed: int) -> None:
    assert forms_of(in_form(boxes_xywh(200, seed), order, unit)) == [(words, 200)]


def small_boxes(count: int, largest: float, seed: int) -> np.ndarray:
    """Boxes (N, 4) of 8 to `largest` pixels inside an image of WIDTH x HEIGHT."""
    rng = np.random.default_rng(seed)
    extent = rng.uniform(8, largest, (count, 2))
    return np.hstack((rng.uniform(0, np.array([WIDTH, HEIGHT]) - extent), extent))


@pytest.mark.parametrize("largest", [30, 80, 200])
@pytest.mark.parametrize("unit", [None, 1])
def test_centres_are_told_of_small_objects_too(largest: float, unit: float | None) -> None:
    words = "centre x, centre y, width, height"
    for seed in range(20):
        boxes = in_form(small_boxes(400, largest, seed), "centre", unit)
        assert forms_of(boxes) == [(words if unit is None else f"relative {words} (0 to 1)", 400)]


@pytest.mark.parametrize(("order", "words"), [("coco", "y, x, height, width"), ("corners", "y0, x0, y1, x1")])
def test_y_before_x_is_told_unless_images_are_square(order: str, words: str) -> None:
    for largest in (30, 200):
        boxes = in_form(small_boxes(200, largest, 0), order, None)
        assert forms_of(boxes[:, [1, 0, 3, 2]]) == [(words, 200)]
    square = small_boxes(200, 200, 0) * ([1, 0.75, 1, 1] if order == "coco" else 1)
    assert forms_of(square[:, [1, 0, 3, 2]], (WIDTH, WIDTH)) == []


@pytest.mark.parametrize("largest", [12, 30, 100, 300])
def test_careless_boxes_are_of_no_other_form(largest: float) -> None:
    """A tenth of them reach past what they enclose, and some of those past their image."""
    for seed in range(20):
        boxes = small_boxes(3000, largest, seed)
        boxes[::10, 2:] += np.random.default_rng(seed).uniform(0, 40, (300, 2))
        assert forms_of(boxes) == []


def test_a_single_box_may_be_relative() -> None:
    assert forms_of(np.array([[0.4, 0.4, 0.2, 0.2]])) == [("relative ones (0 to 1, as YOLO has them)", 1)]


@pytest.mark.parametrize("count", [0, 1, 3, 30, 1000])
def test_nothing_is_said_of_right_boxes(count: int) -> None:
    for seed in range(20):
        assert forms_of(boxes_xywh(count, seed)) == []
        assert forms_of(np.round(boxes_xywh(count, seed))) == []


@pytest.mark.parametrize(
    ("boxes", "side"),
    [
        ([[0, 0, 1, 1], [0, 0, 0.5, 1]], (1, 1)),
        ([[0, 0, 1, 2]], (2, 2)),
        ([[0, 0, 0.4, 0.7], *boxes_xywh(30).tolist()], (WIDTH, HEIGHT)),  # a sliver, cut off by the corner
        (in_form(boxes_xywh(80), "coco", 100), (110, 110)),  # little could lie beyond 100
        (boxes_xywh(300) + np.array([0, 0, 40, 40]), (WIDTH, HEIGHT)),
    ],
    ids=["one pixel", "two pixels", "a sliver", "a small image", "past the edge"],
)
def test_nothing_is_said_of_what_may_be_meant(boxes: Any, side: tuple[int, int]) -> None:
    assert forms_of(np.array(boxes, dtype=float), side) == []


def annotation(id: int, image_id: int, bbox: list[float], category_id: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def read(folder: Path, *rows: dict[str, Any], images: int = 2, names: tuple[str, ...] = ("cat", "dog")) -> Annotations:
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)],
        "annotations": list(rows),
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return read_annotations(folder / "a.json")


def test_a_part_of_relative_boxes_is_named(tmp_path: Path) -> None:
    rows = [annotation(i, 1, box) for i, box in enumerate(boxes_xywh(20).tolist(), 1)]
    for place in (3, 11):
        rows[place]["bbox"] = [0.25, 0.5, 0.125, 0.25]
    rows.append(annotation(21, 1, [300, 200, 0.5, 9]))
    corrections = read(tmp_path, *rows).corrections
    assert [ids for _, ids in corrections.likely_formats] == [(4, 12)]
    assert "2 boxes look like relative" in corrections.doubtful_formats()[0]
    assert corrections.below_pixel == (21,)


def test_doubles_are_told_from_near_ones_and_from_two_classes(tmp_path: Path) -> None:
    rows = [
        annotation(1, 1, [10, 10, 100, 50]),
        annotation(2, 1, [10, 10, 100, 50]),
        annotation(3, 1, [10.004, 10, 99.99, 50]),  # rounding
        annotation(4, 1, [10, 10, 100, 51]),
        annotation(5, 1, [10, 10, 100, 50], category_id=2),
        annotation(6, 2, [10, 10, 100, 50]),  # another image
        annotation(7, 1, [10, 10, 100, 90]),  # another object
        annotation(8, 2, [10, 10, 100, 50], iscrowd=1),
    ]
    duplicates = find_duplicates(read(tmp_path, *rows))
    assert duplicates.equal.tolist() == [2, 3]
    assert duplicates.nearly_equal.tolist() == [4] and duplicates.two_classes.tolist() == [5]
    assert "2 annotations repeat" in next(duplicates.problems()) and len(list(duplicates.notes())) == 2
    assert "(annotations 2, 3)" in next(duplicates.problems())
    rows[7]["id"] = 1  # as where two exports are joined: ids name nothing then
    assert "(annotations number 1, number 2)" in next(find_duplicates(read(tmp_path, *rows)).problems())


def test_doubles_are_found_as_comparing_all_pairs_finds_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    boxes = np.round(boxes_xywh(60), 1)
    boxes = np.vstack((boxes, boxes[rng.integers(0, 60, 30)], boxes[:20] * rng.uniform(0.99, 1.01, (20, 4))))
    images, classes = rng.integers(1, 3, len(boxes)), rng.integers(1, 3, len(boxes))
    rows = [annotation(i + 1, int(images[i]), boxes[i].tolist(), int(classes[i])) for i in range(len(boxes))]
    annotations = read(tmp_path, *rows)
    found = find_duplicates(annotations)
    equal = {
        j + 1
        for j in range(len(boxes))
        for i in range(j)
        if images[i] == images[j] and classes[i] == classes[j] and (boxes[i] == boxes[j]).all()
    }
    assert set(found.equal.tolist()) == equal and len(equal) > 5
    assert len(find_duplicates(read(tmp_path)).equal) == 0


def test_doubles_among_many_boxes_of_one_sum_are_found(tmp_path: Path) -> None:
    """And beside a box so large that a sum with it has no room for theirs."""
    for step, extent in ((1, [8, 8]), (1.1, [8.125, 7.9])):
        boxes = [[step * i, step * (400 - i), *extent] for i in range(400)] * 2
        rows = [annotation(i, 1, box) for i, box in enumerate([[0, 0, 9e15, 5], *boxes], 1)]
        assert find_duplicates(read(tmp_path, *rows)).equal.tolist() == list(range(402, 802))


def test_many_classes_cost_no_look_at_each_others(tmp_path: Path) -> None:
    count = 10_000
    rows = [annotation(i, 1, [1, 1, 9, 9], i) for i in range(1, count)]
    found = read(tmp_path, *rows, names=tuple(f"class {i}" for i in range(count)))
    swapped = [Category(one.id, f"{one.name} ") for one in found.categories]
    began = time.process_time()
    assert f"1 classes have no object: not learned from this split, nor measured on it: 'class {count - 1}'" in next(
        class_notes(found)
    )
    assert len(list(check_categories(swapped, found.categories))) == count
    with pytest.raises(UserError, match=r"1 'class 0', 2 'class 1', .* and 9989 more"):
        label_map(found, swapped)
    assert time.process_time() - began < 2


def test_relative_boxes_are_no_doubles_for_being_small(tmp_path: Path) -> None:
    rows = [annotation(i, 1, [0.3, 0.3 + i / 1000, 0.2, 0.2]) for i in range(1, 9)]
    assert not len(find_duplicates(read(tmp_path, *rows)).equal)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "there are no annotations"),
        ([annotation(1, 1, [1, 1, 9, 9], iscrowd=1)], "all 1 annotations have iscrowd 1"),
        ([annotation(1, 1, [1, 1, 0, 9]), annotation(2, 7, [1, 1, 9, 9])], "all 2 annotations are dropped"),
        (
            [annotation(1, 1, [1, 1, 0, 9]), annotation(2, 1, [1, 1, 9, 9], iscrowd=True)],
            "1 annotations have iscrowd 1.* and 1 annotations are dropped",
        ),
    ],
    ids=["none", "crowds", "dropped", "both"],
)
def test_a_split_without_objects_says_why(tmp_path: Path, rows: list[dict[str, Any]], reason: str) -> None:
    annotations = read(tmp_path, *rows)
    assert without_objects(read(tmp_path, annotation(1, 1, [1, 1, 9, 9]), *rows[1:])) is None
    text = without_objects(annotations)
    assert text is not None
    dataset = CocoDataset(tmp_path, rewritten(tmp_path, *rows), EvaluationTransform(9, 9))
    with pytest.warns(UserWarning, match=rf"nothing to train on: {reason}"), pytest.warns(match="No AP.*latest"):
        warn_before_training(dataset, dataset)


def rewritten(folder: Path, *rows: dict[str, Any]) -> Path:
    """The annotation file with these rows, beside images that are there."""
    for i in (1, 2):
        Image.new("L", (WIDTH, HEIGHT)).save(folder / f"{i}.png")
    return read(folder, *rows).file


def test_classes_that_cannot_be_learned_are_named(tmp_path: Path) -> None:
    rows = [annotation(i, 1, [i, i, 9, 9]) for i in range(1, 202)]
    rows += [annotation(901, 1, [1, 1, 9, 9], 2, iscrowd=1), annotation(902, 1, [99, 1, 9, 9], 4)]
    notes = "\n".join(class_notes(read(tmp_path, *rows, names=("cat", "crowd", "none", "rare", " CAT"))))
    assert "1 classes have crowds alone (iscrowd 1), which are neither trained on nor measured: 'crowd'" in notes
    assert "2 classes have no object" in notes and "'none', ' CAT'" in notes
    assert "less than 1 object for 100 of the most frequent class: 'rare'" in notes
    assert "categories 1 'cat' and 5 ' CAT' differ in case or spaces" in notes
    assert list(class_notes(read(tmp_path, *rows[:1], names=("cat",)))) == []


def test_more_objects_than_coco_counts_are_counted_by_class(tmp_path: Path) -> None:
    rows = [annotation(i, 1, [i, 5, 9, 9], 1 + i % 2) for i in range(200)]
    assert beyond_coco(read(tmp_path, *rows)) is None
    text = beyond_coco(read(tmp_path, *({**row, "category_id": 1} for row in rows)))
    assert text is not None and "1 images have more than 100 objects of one class (up to 200; 1.png)" in text
    assert beyond_coco(read(tmp_path, *({**row, "category_id": 1, "iscrowd": 1} for row in rows))) is None


@pytest.mark.parametrize(
    ("area", "counted", "taken"),
    [
        *((0, True, 5000), (-4, True, 5000), (0.016, True, 5000), (1e9, True, 5000)),
        *((400, False, 400), (5151, False, 5151), (None, False, 5000)),
    ],
)
def test_an_area_that_cannot_be_is_its_boxs(tmp_path: Path, area: float | None, counted: bool, taken: float) -> None:
    """It says which objects are small, medium and large."""
    annotations = read(tmp_path, annotation(1, 1, [5, 5, 100, 50], area=area))
    assert annotations.areas.tolist() == [taken]
    assert annotations.corrections.corrected_area == ((1,) if counted else ())
    assert ("areas are 0" in "".join(annotations.corrections.lines())) == counted


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_the_header_says_how_the_image_stands(tmp_path: Path, ending: str) -> None:
    for orientation in (1, 3, 6):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.new("RGB", (60, 40)).save(tmp_path / f"a.{ending}", exif=exif)
        header = read_header(tmp_path / f"a.{ending}")
        assert header is not None and header.orientation == orientation
        assert header.turned == (orientation != 1 and ending != "tif")  # a TIFF is turned upright when it is read


def test_no_header_is_an_error(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    whole, rng = (tmp_path / "a.jpg").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        broken[rng.integers(0, 120)] = rng.integers(0, 256)
        (tmp_path / "a.jpg").write_bytes(broken)
        read_header(tmp_path / "a.jpg")
    for kind, content in (("exif", b"II*"), ("exif", "II*"), ("xmp", 5), ("Raw profile type exif", "\n\n\nno hex")):
        image = Image.new("L", (1, 1))
        image.info[kind] = content
        assert orientation_of(image) == UPRIGHT
    (tmp_path / "a.jpg").write_bytes(b"")
    assert read_header(tmp_path / "a.jpg") is read_header(tmp_path / "none.jpg") is None


def dataset(folder: Path, **options: Any) -> CocoDataset:
    return CocoDataset(folder, rewritten(folder, annotation(1, 1, [1, 1, 9, 9])), EvaluationTransform(9, 9), **options)


def test_a_few_files_are_looked_at_before_the_first_step(tmp_path: Path) -> None:
    strict, lenient = dataset(tmp_path), dataset(tmp_path, on_bad_image="skip")
    exif = Image.Exif()
    exif[0x112] = 3
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "1.png", exif=exif)
    with pytest.warns(UserWarning, match=r"of 2 images looked at, 1 have an EXIF orientation \(1\.png\)"):
        warn_before_training(strict, strict)
    Image.new("L", (HEIGHT, WIDTH)).save(tmp_path / "2.png", exif=exif)
    with pytest.raises(UserError, match=r"2\.png: is 480 x 640, but.*has orientation 3"):
        check_files(strict)
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"1\.png: cannot be decoded"):
        check_files(strict)
    with pytest.raises(UserError, match="no image can be used"):
        check_files(lenient)
