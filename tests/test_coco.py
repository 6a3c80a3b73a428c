"""COCO files as they are found: right ones read as COCO's tools read them, wrong ones mended or refused by id."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from detr_fast.config import ModelConfig, UserError
from detr_fast.data import splits
from detr_fast.data.annotations import Category, read_annotations
from detr_fast.data.coco import CocoDataset, build_dataset, find_split
from detr_fast.data.transforms import EvaluationTransform, TrainTransform
from detr_fast.options import DataOptions, TrainOptions
from tests.coco_files import Write, annotation, document

AS_IT_IS = EvaluationTransform(size=40, max_size=1333)
"""Of images of 60 x 40 pixels."""


def dataset_of(file: Path, **options: Any) -> CocoDataset:
    return CocoDataset(file.parent / "images", file, AS_IT_IS, **options)


def test_a_sample_is_relative_cxcywh(write: Write) -> None:
    dataset = dataset_of(write(document(annotation(1, [6, 4, 30, 20], 2))))
    sample = dataset[0, 0]
    assert sample.image.shape == (3, 40, 60) and sample.image.dtype == torch.uint8
    assert sample.labels.tolist() == [1] and sample.labels.dtype == torch.int64
    torch.testing.assert_close(sample.boxes_cxcywh, torch.tensor([[21 / 60, 14 / 40, 0.5, 0.5]]))
    assert (sample.image_id, sample.original_size) == (1, (40, 60))


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
    assert read_annotations(wrong_file).corrections.likely_formats
    with pytest.warns(UserWarning, match="x0, y0, x1, y1"):
        images = str(wrong_file.parent / "images")
        build_dataset(DataOptions(val_images=images, val_annotations=str(wrong_file)), "val")
    assert not read_annotations(write(document(*right))).corrections.likely_formats
    careless = [annotation(i, [40, 30, 25, 15]) for i in range(1, 9)]  # past the edge, but no corners: 25 < 40
    assert not read_annotations(write(document(*careless))).corrections.likely_formats


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


def test_data_reads_as_pycocotools_does(shapes_root: Path) -> None:
    folder, file = shapes_root / "val", shapes_root / "annotations" / "val.json"
    dataset, reference = CocoDataset(folder, file, AS_IT_IS), COCO(str(file))
    assert [record.id for record in dataset.records] == sorted(reference.getImgIds())
    for record in dataset.records:
        rows = reference.imgToAnns[record.id]
        x, y, width, height = np.array([row["bbox"] for row in rows]).T
        assert np.array_equal(record.boxes_xyxy_px, np.stack((x, y, x + width, y + height), axis=1))
        assert dataset.categories is not None
        assert [dataset.categories[label].id for label in record.labels] == [row["category_id"] for row in rows]
    assert dataset.coco_document()["annotations"] == list(reference.anns.values())


def test_shapes_are_found_and_read_at_their_own_size(shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(splits, "ensure_shapes", lambda side: asked.append(side) or shapes_root)
    model = ModelConfig(image_size=64, max_size=64)
    dataset = build_dataset(DataOptions(data="shapes:64"), "val", model)
    assert asked == [64] and len(dataset) == 12 and dataset.num_classes == 6
    assert dataset[0, 0].image.shape == (3, 64, 64)
    assert find_split(DataOptions(data="shapes"), "test") is None


def test_options_decide_the_transform(shapes_root: Path) -> None:
    options = TrainOptions.of(data=str(shapes_root), train_sizes=(32,), crop_sizes=(), seed=5, on_bad_image="skip")
    options = options.but(min_visible=0.3)
    train = build_dataset(options, "train")
    assert train.transform == TrainTransform((32,), 1333, (), (384, 600))
    assert (train.seed, train.on_bad_image, train.min_visible) == (5, "skip", 0.3)
    val = build_dataset(options, "val")
    assert (val.transform, val.min_visible) == (EvaluationTransform(800, 1333), 0)
    smaller = DataOptions(data=str(shapes_root), image_size=96, max_size=120)
    assert build_dataset(smaller, "train", ModelConfig()).transform == EvaluationTransform(96, 120)
    tiny = TrainOptions.of(model="detr_tiny", data=str(shapes_root))
    assert build_dataset(tiny, "val").transform == EvaluationTransform(64, 64)
