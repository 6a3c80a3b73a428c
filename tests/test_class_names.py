"""A detector's labels are named: by the weights, by a COCO json, or as is assumed and said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detr_fast import Detector, build_model, export_state_dict, load_model
from detr_fast.config import UserError
from detr_fast.data.annotations import Category
from detr_fast.evaluation.dataset import evaluation_dataset
from detr_fast.export import write_weights
from detr_fast.options import EvaluateOptions
from detr_fast.weights import Naming
from tests.small_detr import SMALL

PETS = (Category(0, "dog"), Category(1, "parrot"), Category(2, "cat"))
pytestmark = pytest.mark.usefixtures("narrow")


def coco_json(path: Path, categories: dict[int, str], images: bool = True) -> Path:
    rows = [{"id": id_, "name": name} for id_, name in categories.items()]
    boxes = [
        {"id": number, "image_id": 1, "category_id": id_, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
        for number, id_ in enumerate(categories, 1)
    ]
    listed = [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}]
    path.write_text(
        json.dumps({"images": listed, "annotations": boxes, "categories": rows} if images else {"categories": rows})
    )
    return path


def head_of(path: Path, num_classes: int, naming: Naming = "facebook", categories: Any = None) -> Path:
    model = build_model("detr_r50", num_classes=num_classes, **SMALL)
    if categories is None:
        torch.save({"model": export_state_dict(model, naming)}, path)
    else:
        write_weights(Detector(model, categories), path, naming)
    return path


@pytest.mark.parametrize(
    ("num_classes", "own", "data", "labels", "said"),
    [
        (91, None, {1: "red", 7: "blue"}, {1: "red", 7: "blue", 0: "N/A"}, "category ids"),
        (4, None, {1: "red", 3: "blue"}, {1: "red", 3: "blue"}, "category ids"),  # --num_classes of largest id + 1
        (2, None, {1: "red", 7: "blue"}, {0: "red", 1: "blue"}, "ascending order"),
        (2, ("blue", "red"), {1: "RED ", 7: "blue"}, {0: "blue", 1: "RED "}, "its own names"),
        (2, ("cat", "red"), {0: "red", 1: "blue"}, {0: "red", 1: "blue"}, "category ids"),  # left from before
    ],
)
def test_categories_name_the_labels(
    num_classes: int, own: Any, data: dict[int, str], labels: dict[int, str], said: str, tmp_path: Path
) -> None:
    named = own and tuple(Category(label, name) for label, name in enumerate(own))
    path = head_of(tmp_path / "head.pth", num_classes, categories=named)
    file = coco_json(tmp_path / "data.json", data, images=False)
    model = load_model(path, categories=file)
    assert model.categories is not None and len(model.categories) == num_classes
    for label, name in labels.items():
        assert model.categories[label].name == name
        assert name not in data.values() or data[model.categories[label].id] == name
    assert said in model.notes[-1]
    given = [Category(id_, name) for id_, name in data.items()]
    assert load_model(path, categories=given).categories == model.categories


def test_categories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = head_of(tmp_path / "head.pth", 3)
    with pytest.raises(UserError, match=r"data\.json.*ids up to 7, but the class head has 3 classes, 0 to 2"):
        load_model(path, categories=coco_json(tmp_path / "data.json", {1: "red", 7: "blue"}))
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"data\.json: 'categories' must be"):
        load_model(path, categories=tmp_path / "data.json")


def test_names_that_are_assumed_are_said(tmp_path: Path) -> None:
    (note,) = load_model(head_of(tmp_path / "coco.pth", 91)).notes
    assert "names none of its 91 classes: COCO's names are assumed" in note and "--categories" in note
    (note,) = load_model(head_of(tmp_path / "four.pth", 4)).notes
    assert "labels are category ids, without names" in note and "--categories" in note
    assert load_model(head_of(tmp_path / "own.pth", 3, categories=PETS)).notes == ()


@pytest.mark.parametrize(
    ("num_classes", "own", "said"),
    [
        (91, None, "91 classes: COCO's names are assumed.*--categories"),
        (2, None, "does not say which.*--categories"),
        (2, ("red", "blue"), r"differ in id.*: 1 'red' and 0 'red'.* The names agree: --categories .* gives their ids"),
        (2, ("cat", "dog"), "trained on this data take --categories"),
    ],
)
def test_evaluation_on_other_classes_gives_the_way_on(num_classes: int, own: Any, said: str, tmp_path: Path) -> None:
    named = own and tuple(Category(label, name) for label, name in enumerate(own))
    weights = str(head_of(tmp_path / "head.pth", num_classes, categories=named))
    file = coco_json(tmp_path / "val.json", {1: "red", 2: "blue"})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    options = EvaluateOptions.of(weights=weights, val_images=str(tmp_path), val_annotations=str(file))
    with pytest.raises(UserError, match=said):
        evaluation_dataset(load_model(weights), options)
    dataset = evaluation_dataset(load_model(weights, categories=file), options)
    assert dataset.categories is not None
    assert [dataset.categories[dataset.label_of[id_]].name for id_ in (1, 2)] == ["red", "blue"]
