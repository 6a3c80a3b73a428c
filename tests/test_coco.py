"""COCO files as they are found: right ones read as COCO's tools read them, wrong ones mended or refused by id."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from detr_fast.config import DataOptions, ModelConfig, TrainConfig, UserError
from detr_fast.data import splits
from detr_fast.data.annotations import Category, read_annotations
from detr_fast.data.coco import CocoDataset, build_dataset, find_split
from detr_fast.data.transforms import EvaluationTransform, TrainTransform

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
AS_IT_IS = EvaluationTransform(size=40, max_size=1333)
"""Of images of 60 x 40 pixels."""


def annotation(id: int, bbox: list[float], category_id: int = 1, image_id: int = 1, **more: Any) -> dict[str, Any]:
    box = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0}
    return {**box, "area": bbox[2] * bbox[3], **more}


def document(*annotations: dict[str, Any], images: int = 2) -> dict[str, Any]:
    """`images` images of 60 x 40 pixels with ids from 1, categories 1 and 2."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 60, "height": 40} for i in range(1, images + 1)],
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a document, or text, to annotations.json beside a folder of images; returns the file."""
    (tmp_path / "images").mkdir()
    for i in range(1, 4):
        Image.new("RGB", (60, 40), (i * 40, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")

    def write_file(content: Any) -> Path:
        file = tmp_path / "annotations.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write_file


def dataset_of(file: Path, **options: Any) -> CocoDataset:
    return CocoDataset(file.parent / "images", file, AS_IT_IS, **options)


def test_a_sample_is_relative_cxcywh(write: Write) -> None:
    dataset = dataset_of(write(document(annotation(1, [6, 4, 30, 20], 2))))
    sample = dataset[0, 0]
    assert sample.image.shape == (3, 40, 60) and sample.image.dtype == torch.uint8
    assert sample.labels.tolist() == [1] and sample.labels.dtype == torch.int64
    torch.testing.assert_close(sample.boxes_cxcywh, torch.tensor([[21 / 60, 14 / 40, 0.5, 0.5]]))
    assert (sample.image_id, sample.original_size) == (1, (40, 60))


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


def test_fault_20_boxes_past_the_edge_are_clamped_and_counted(write: Write) -> None:
    file = write(
        document(annotation(1, [-5, 5, 20, 10]), annotation(2, [50, 30, 20.0, 20]), annotation(3, [0, 0, 60.01, 9]))
    )
    dataset = dataset_of(file)
    assert dataset.records[0].boxes_xyxy_px.tolist() == [[0, 5, 15, 15], [50, 30, 60, 40], [0, 0, 60, 9]]
    assert dataset.annotations.corrections.clamped == (1, 2)  # the third is rounding
    assert dataset.coco_document()["annotations"][0]["bbox"] == [-5, 5, 20, 10]  # evaluated as COCO evaluates it


def test_fault_20_corners_given_as_sizes_warn(write: Write) -> None:
    rng = np.random.default_rng(0)
    low = rng.integers(0, [45, 25], (40, 2))
    high = low + rng.integers(5, 15, (40, 2))
    corners = [annotation(i, [*map(int, (*a, *b))]) for i, (a, b) in enumerate(zip(low, high, strict=True), 1)]
    right = [annotation(i, [*map(int, (*a, *(b - a)))]) for i, (a, b) in enumerate(zip(low, high, strict=True), 1)]
    wrong_file = write(document(*corners))
    assert read_annotations(wrong_file).corrections.likely_forms
    with pytest.warns(UserWarning, match="x0, y0, x1, y1"):
        images = str(wrong_file.parent / "images")
        build_dataset(DataOptions(val_images=images, val_annotations=str(wrong_file)), "val")
    assert not read_annotations(write(document(*right))).corrections.likely_forms
    careless = [annotation(i, [40, 30, 25, 15]) for i in range(1, 9)]  # past the edge, but no corners: 25 < 40
    assert not read_annotations(write(document(*careless))).corrections.likely_forms


def test_fault_21_images_without_targets_stay(write: Write) -> None:
    dataset = dataset_of(write(document(annotation(1, [5, 5, 9, 9], image_id=2), images=3)))
    assert [len(record.labels) for record in dataset.records] == [0, 1, 0]
    sample = dataset[0, 0]
    assert sample.boxes_cxcywh.shape == (0, 4) and sample.labels.dtype == torch.int64
    nothing = dataset_of(write(document()))
    assert len(nothing) == 2 and nothing[0, 1].labels.shape == (0,)
    assert nothing.coco_document()["annotations"] == []


def test_targets_of_an_image_keep_the_files_order(write: Write) -> None:
    rows = [annotation(i, [i, 1, 9, 9], image_id=1 + i % 3) for i in range(48)]
    dataset = dataset_of(write(document(*rows, images=3)))
    for remainder, record in enumerate(dataset.records):
        assert record.boxes_xyxy_px[:, 0].tolist() == list(range(remainder, 48, 3))


def test_fault_22_more_targets_than_queries_warn(write: Write, recwarn: pytest.WarningsRecorder) -> None:
    dataset = dataset_of(write(document(*(annotation(i, [i, i, 9, 9]) for i in range(1, 6)))))
    dataset.warn_if_queries_are_few(5)
    assert len(recwarn) == 0
    dataset.warn_if_queries_are_few(4)
    assert "1 images" in str(recwarn[0].message) and "--num-queries" in str(recwarn[0].message)


def test_fault_23_crowds_are_evaluated_but_not_trained_on(write: Write) -> None:
    dataset = dataset_of(write(document(annotation(1, [5, 5, 9, 9], iscrowd=1), annotation(2, [1, 1, 9, 9], 2))))
    assert dataset.records[0].labels.tolist() == [1]
    assert [(row["id"], row["iscrowd"]) for row in dataset.coco_document()["annotations"]] == [(1, 1), (2, 0)]


def with_categories(ids: list[int], *annotations: dict[str, Any]) -> dict[str, Any]:
    return {**document(*annotations), "categories": [{"id": id_, "name": f"class {id_}"} for id_ in ids]}


def test_fault_24_sparse_and_zero_based_categories_are_remapped(write: Write) -> None:
    annotations = [annotation(i, [1, 1, 9, 9], category) for i, category in enumerate((90, 0, 7), 1)]
    dataset = dataset_of(write(with_categories([90, 0, 7], *annotations)))
    assert dataset.records[0].labels.tolist() == [2, 0, 1]
    assert dataset.categories == (Category(0, "class 0"), Category(7, "class 7"), Category(90, "class 90"))
    assert dataset.num_classes == 3 and dataset.label_of == {0: 0, 7: 1, 90: 2}
    assert [row["category_id"] for row in dataset.coco_document()["annotations"]] == [90, 0, 7]


def test_fault_24_unlisted_category_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="annotation 4 has 99"):
        read_annotations(write(document(annotation(4, [1, 1, 9, 9], 99))))


def test_raw_ids_are_the_labels(write: Write) -> None:
    file = write(with_categories([1, 90], annotation(1, [1, 1, 9, 9], 90)))
    dataset = dataset_of(file, raw_ids=True)
    assert dataset.categories is None and dataset.num_classes == 91 and dataset.records[0].labels.tolist() == [90]
    named = dataset_of(file, num_classes=92)
    assert named.num_classes == 92 and named.records[0].labels.tolist() == [90]
    assert named.categories is not None and [named.categories[label].name for label in (0, 1, 90)] == [
        "N/A",
        "class 1",
        "class 90",
    ]


@pytest.mark.parametrize("num_classes", [1, 5, 90])
def test_a_number_of_classes_that_leaves_labels_without_meaning_is_refused(write: Write, num_classes: int) -> None:
    file = write(with_categories([1, 90], annotation(1, [1, 1, 9, 9], 90)))
    assert dataset_of(file, num_classes=2).categories is not None
    with pytest.raises(UserError, match=f"--num-classes {num_classes}: .*at least 91"):
        dataset_of(file, num_classes=num_classes)


@pytest.mark.parametrize("value", ["0", 2, None])
def test_fault_24_a_crowd_flag_that_is_none_is_refused(write: Write, value: Any) -> None:
    with pytest.raises(UserError, match="annotation 4: 'iscrowd'"):
        read_annotations(write(document(annotation(4, [1, 1, 9, 9], 1, iscrowd=value))))


def test_fault_19_a_number_beyond_all_bounds(tmp_path: Path) -> None:
    file = tmp_path / "huge.json"
    file.write_text('{"images": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match=r"huge\.json"):
        read_annotations(file)


def test_a_checkpoints_categories_decide_the_labels(write: Write) -> None:
    file = write(document(annotation(1, [1, 1, 9, 9], 2)))
    known = (Category(1, "cat"), Category(2, "dog"), Category(3, "owl"))
    dataset = dataset_of(file, categories=known[::-1])
    assert dataset.records[0].labels.tolist() == [1] and dataset.num_classes == 3
    dataset_of(file, categories=known[1:])  # "cat" is unknown to it, but on no image
    with pytest.raises(UserError, match=r"2 'dog'.*It knows 1 'cat'"):
        dataset_of(file, categories=known[:1])
    with pytest.raises(UserError, match="2 'dog'"):
        dataset_of(file, categories=(Category(1, "cat"), Category(2, "wolf")))


def test_fault_24_missing_crowd_and_area_are_defaulted(write: Write) -> None:
    bare = {key: value for key, value in annotation(3, [1, 1, 9, 8]).items() if key not in ("iscrowd", "area")}
    dataset = dataset_of(write(document(bare)))
    assert dataset.coco_document()["annotations"][0] == annotation(3, [1, 1, 9, 8])
    corrections = dataset.annotations.corrections
    assert (corrections.defaulted_crowd, corrections.defaulted_area) == (1, 1) and not corrections.faults()


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


def with_file_name(name: str) -> dict[str, Any]:
    return {**document(), "images": [{"id": 1, "file_name": name, "width": 60, "height": 40}]}


def test_fault_25_file_names_that_lead_out_are_refused(write: Write, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "secret.jpg")
    (tmp_path / "images-more").mkdir()
    os.symlink(tmp_path / "secret.jpg", tmp_path / "images" / "link.jpg")
    os.symlink(tmp_path, tmp_path / "images" / "up")
    for name in (
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "up/secret.jpg",
        "../images-more/1.jpg",
        ".",
    ):
        with pytest.raises(UserError, match=r"image 1.*leads out"):
            dataset_of(write(with_file_name(name)))


def test_fault_25_names_that_no_file_can_have_are_refused(write: Write) -> None:
    for name in ("a\0b.jpg", "\ud800.jpg"):
        with pytest.raises(UserError, match=r"image 1.*no file name"):
            dataset_of(write(with_file_name(name)))


def test_fault_25_names_that_stay_inside_are_read(write: Write, tmp_path: Path) -> None:
    os.symlink(tmp_path / "images" / "1.jpg", tmp_path / "images" / "link.jpg")
    os.symlink(tmp_path / "images", tmp_path / "linked-folder")
    for name in ("link.jpg", str(tmp_path / "images" / "1.jpg"), "../images/1.jpg"):
        assert dataset_of(write(with_file_name(name)))[0, 0].image.shape == (3, 40, 60)
    file = write(with_file_name("1.jpg"))
    assert CocoDataset(tmp_path / "linked-folder", file, AS_IT_IS)[0, 0].image_id == 1


def test_fault_16_another_size_than_the_json_is_named(write: Write) -> None:
    other = {**document(), "images": [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 60}]}
    with pytest.raises(UserError, match=r"1\.jpg: is 60 x 40, but the annotations say 40 x 60"):
        dataset_of(write(other))[0, 0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["id", "bbox", "images"]), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.sampled_from(["images", "annotations", "categories"]),
    key=st.sampled_from(
        ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "file_name", "width", "name", None]
    ),
    value=json_values,
)
def test_fault_19_whatever_the_json_holds_no_other_error_escapes(
    write: Write, part: str, key: str | None, value: Any
) -> None:
    content = document(annotation(1, [1, 1, 9, 9]), images=1)
    if key is None:
        content[part] = value
    else:
        content[part][0][key] = value
    try:
        dataset_of(write(content)).coco_document()
    except UserError as error:
        assert "annotations.json" in str(error)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is not here")
def test_real_data_reads_as_pycocotools_does() -> None:
    folder, file = SHARED_DATA / "bccd" / "val", SHARED_DATA / "bccd" / "annotations" / "val.json"
    dataset, reference = CocoDataset(folder, file, AS_IT_IS), COCO(str(file))
    assert [record.id for record in dataset.records] == sorted(reference.getImgIds())
    for record in dataset.records:
        rows = reference.imgToAnns[record.id]
        x, y, width, height = np.array([row["bbox"] for row in rows]).T
        expected = np.stack((x, y, x + width, y + height), axis=1).clip(0, np.tile([record.width, record.height], 2))
        assert np.allclose(record.boxes_xyxy_px, expected)
        assert [dataset.categories[label].id for label in record.labels] == [row["category_id"] for row in rows]
    ours = {row["id"]: row for row in dataset.coco_document()["annotations"]}
    for id_, row in reference.anns.items():
        assert all(ours[id_][key] == row[key] for key in ours[id_])


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
        build_dataset(TrainConfig(data=str(coco)), "train")


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


def test_shapes_are_found_and_read_at_their_own_size(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(splits, "ensure_shapes", lambda side: asked.append(side) or shapes_root)
    model = ModelConfig(image_size=64, max_size=64)
    dataset = build_dataset(DataOptions(data="shapes:64"), "val", model)
    assert asked == [64] and len(dataset) == 12 and dataset.num_classes == 6
    assert dataset[0, 0].image.shape == (3, 64, 64)
    assert find_split(DataOptions(data="shapes"), "test") is None


def test_options_decide_the_transform(shapes_root: Path) -> None:
    options = TrainConfig(data=str(shapes_root), train_sizes=(32,), crop_sizes=(), seed=5, on_bad_image="skip")
    train = build_dataset(options, "train")
    assert train.transform == TrainTransform((32,), 1333, (), (384, 600))
    assert (train.seed, train.on_bad_image) == (5, "skip")
    assert build_dataset(options, "val").transform == EvaluationTransform(800, 1333)
    smaller = DataOptions(data=str(shapes_root), image_size=96, max_size=120)
    assert build_dataset(smaller, "train", ModelConfig()).transform == EvaluationTransform(96, 120)
    tiny = TrainConfig(model="detr_tiny", data=str(shapes_root))
    assert build_dataset(tiny, "val").transform == EvaluationTransform(64, 64)
