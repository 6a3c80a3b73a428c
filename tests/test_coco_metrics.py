"""The twelve numbers: hotcoco's against pycocotools', and the cases where a tool alone would mislead."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detr_fast import evaluate
from detr_fast.config import MODELS, UserError
from detr_fast.data.coco import Category, CocoDataset, build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.detector import Detector
from detr_fast.evaluation.coco_metrics import (
    ABSENT,
    METRICS,
    NOTHING_MEASURED,
    UNLIMITED,
    Evaluator,
    PrecisionRecall,
    evaluate_detections,
    evaluate_detector,
    run_hotcoco,
)
from detr_fast.evaluation.inference import category_ids, collect_detections, gather_rows
from detr_fast.evaluation.referee import run_pycocotools
from detr_fast.model.backends import Selectable
from detr_fast.options import DataOptions, EvaluateOptions
from detr_fast.weights import build_model

EVALUATORS = (run_hotcoco, run_pycocotools)


def random_document(seed: int, images: int, categories: int, crowd: float) -> tuple[dict[str, Any], np.ndarray]:
    """Annotations with sparse ids, and detections: good ones, doubles, misses and chance, some of unlisted classes."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    rows: list[list[float]] = []
    for image_id in range(7, 7 + 3 * images, 3):
        for _ in range(rng.integers(0, 9)):
            x, y, width, height = (*rng.uniform(0, 300, 2), *np.exp(rng.uniform(2, 5.7, 2)))
            category_id = 2 * int(rng.integers(1, categories + 1))
            annotations.append(
                {"id": 100 + len(annotations), "image_id": image_id, "category_id": category_id}
                | {"bbox": [x, y, width, height], "area": width * height * rng.uniform(0.5, 1)}
                | {"iscrowd": int(rng.random() < crowd)}
            )
            for _ in range(rng.integers(0, 3)):
                box = np.array([x, y, width, height]) * rng.uniform(0.9, 1.1, 4)
                rows.append([image_id, *box, float(np.float32(round(rng.random(), 2))), category_id])
        for _ in range(rng.integers(0, 110)):
            rows.append([image_id, *rng.uniform(1, 300, 4), rng.random() / 2, int(rng.integers(1, 2 * categories + 4))])
    return {
        "images": [{"id": id_, "width": 640, "height": 480} for id_ in range(7, 7 + 3 * images, 3)],
        "annotations": annotations,
        "categories": [{"id": 2 * i, "name": f"class {i}"} for i in range(1, categories + 2)],
    }, np.array(rows, dtype=np.float64).reshape(-1, 7)


CASES = {
    "many classes": random_document(0, images=40, categories=12, crowd=0.0),
    "crowds": random_document(1, images=40, categories=3, crowd=0.3),
    "one class, over 100 detections an image": random_document(2, images=25, categories=1, crowd=0.1),
    "images without annotations": random_document(3, images=3, categories=2, crowd=0.0),
}
CASES["no detections"] = (CASES["crowds"][0], np.zeros((0, 7)))
CASES["no annotations"] = ({**CASES["crowds"][0], "annotations": []}, CASES["crowds"][1])
CASES["crowds alone"] = (
    {**CASES["crowds"][0], "annotations": [{**one, "iscrowd": 1} for one in CASES["crowds"][0]["annotations"]]},
    CASES["crowds"][1],
)


@pytest.mark.parametrize("case", CASES)
def test_hotcoco_and_pycocotools_agree_bit_by_bit(case: str) -> None:
    fast, referee = (evaluate_detections(*CASES[case], evaluator) for evaluator in EVALUATORS)
    assert tuple(fast.metrics) == METRICS
    assert fast.metrics == referee.metrics
    assert fast.per_class == referee.per_class
    assert fast.curves.names == referee.curves.names
    for name in ("recall", "precision", "scores"):
        np.testing.assert_array_equal(getattr(fast.curves, name), getattr(referee.curves, name))


def test_the_cases_are_neither_perfect_nor_hopeless() -> None:
    """Equality of the tools would prove little otherwise."""
    for case in ("many classes", "crowds", "one class, over 100 detections an image"):
        assert 0.02 < evaluate_detections(*CASES[case]).metrics["AP"] < 0.6


def one_object(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
    return {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "annotations": [annotation | changes],
        "categories": [{"id": 3, "name": "three"}, {"id": 8, "name": "eight"}],
    }


PERFECT = np.array([[1, 10, 10, 50, 50, 0.9, 3]])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_annotation_id_0_counts(evaluator: Evaluator) -> None:
    assert evaluate_detections(one_object(id=0), PERFECT, evaluator).metrics["AP"] == pytest.approx(1.0)


def test_no_detections_give_zero_and_absent_sizes_say_so() -> None:
    metrics = evaluate_detections(one_object(), np.zeros((0, 7))).metrics
    assert metrics["AP"] == metrics["APm"] == metrics["AR100"] == 0.0
    assert metrics["APs"] == metrics["APl"] == ABSENT


def test_detections_of_a_crowd_are_not_counted_against_the_model() -> None:
    document = one_object()
    crowd = {"id": 2, "image_id": 1, "category_id": 3, "bbox": [100, 100, 90, 90], "area": 8100, "iscrowd": 1}
    on_the_crowd = np.array([[1, 110, 110, 30, 30, 0.95, 3]])
    document["annotations"].append(crowd)
    assert evaluate_detections(document, np.vstack((PERFECT, on_the_crowd))).metrics["AP"] == pytest.approx(1.0)
    document["annotations"].pop()
    assert evaluate_detections(document, np.vstack((PERFECT, on_the_crowd))).metrics["AP"] == pytest.approx(0.5)


def test_classes_of_one_name_are_told_apart() -> None:
    document = one_object()
    document["categories"][1]["name"] = "three"
    per_class = evaluate_detections(document, PERFECT).per_class
    assert set(per_class) == {"three (3)", "three (8)"}
    assert per_class["three (3)"]["AP50"] == pytest.approx(1.0)
    assert per_class["three (8)"]["AP50"] == ABSENT


def test_names_given_to_classes_of_one_name_are_no_other_classs() -> None:
    document = one_object()
    document["categories"] = [{"id": id_, "name": name} for id_, name in ((1, "a"), (3, "a"), (4, "a (1)"))]
    per_class = evaluate_detections(document, PERFECT).per_class
    assert len(per_class) == 3 and [one["AP"] for one in per_class.values() if one["AP"] > ABSENT] == [pytest.approx(1)]


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_names_that_no_encoding_has_are_no_evaluators_concern(evaluator: Evaluator) -> None:
    document = one_object()
    document["images"][0]["file_name"] = "caf\udce9.jpg"
    document["categories"][0]["name"] = "\ud800x"
    evaluation = evaluate_detections(document, PERFECT, evaluator)
    assert evaluation.per_class["\ud800x"]["AP"] == pytest.approx(1.0) and evaluation.curves.names == ("\ud800x",)


def dense(objects: int, classes: int = 1) -> tuple[dict[str, Any], np.ndarray]:
    """One image with so many objects, and detections that are the objects themselves."""
    boxes = [[float(16 * (i % 15)), float(16 * (i // 15)), 10.0, 10.0] for i in range(objects)]
    rows = [{"image_id": 1, "category_id": i % classes, "bbox": box, "area": 100.0} for i, box in enumerate(boxes)]
    document = {
        "images": [{"id": 1, "width": 240, "height": 400}],
        "annotations": [{**row, "id": i, "iscrowd": 0} for i, row in enumerate(rows, 1)],
        "categories": [{"id": i, "name": str(i)} for i in range(classes)],
    }
    return document, np.array([[1, *box, 1 - i / 1e4, i % classes] for i, box in enumerate(boxes)])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_beyond_100_objects_of_a_class_the_numbers_without_cocos_limit_stand_beside(evaluator: Evaluator) -> None:
    limited = evaluate_detections(*dense(150), evaluator)
    assert limited.metrics["AP"] == pytest.approx(0.663, abs=1e-3)  # 67 of the 101 recall steps
    assert limited.unlimited == pytest.approx(dict.fromkeys(UNLIMITED, 1.0))
    assert {**limited.to_dict(), "AP": 0}.keys() >= {*METRICS, *UNLIMITED}
    assert "AP_all_detections 1.000" in limited.line()
    for enough in (dense(100), dense(150, classes=2)):
        evaluation = evaluate_detections(*enough, evaluator)
        assert evaluation.metrics["AP"] == pytest.approx(1.0) and evaluation.unlimited == {}
        assert not evaluation.to_dict().keys() & {*UNLIMITED}


def test_both_tools_agree_without_the_limit() -> None:
    document, rows = dense(180)
    rng = np.random.default_rng(0)
    rows[:, 1:5] += rng.normal(0, 1, (len(rows), 4))
    rows[:, 5] = rng.random(len(rows))
    fast, referee = (evaluate_detections(document, rows, evaluator) for evaluator in EVALUATORS)
    assert fast.metrics == referee.metrics and fast.unlimited == referee.unlimited
    assert 0.05 < fast.metrics["AP"] < fast.unlimited["AP_all_detections"] < 0.95


@pytest.mark.parametrize("annotations", [[], [{**one_object()["annotations"][0], "iscrowd": 1}]])
def test_where_nothing_can_be_measured_no_number_stands(annotations: list[dict[str, Any]]) -> None:
    evaluation = evaluate_detections({**one_object(), "annotations": annotations}, PERFECT)
    written = evaluation.to_dict()
    assert evaluation.measured == {} and evaluation.line() == written["note"] == NOTHING_MEASURED
    assert {written[name] for name in METRICS} == {None} and written["at_best_f1"] is None
    assert written["per_class"] == {name: {"AP": None, "AP50": None} for name in ("three", "eight")}


def test_only_what_the_data_bears_on_is_a_number_in_the_json() -> None:
    written = evaluate_detections(one_object(), PERFECT).to_dict()
    assert "note" not in written and written["APs"] is None and written["APm"] == pytest.approx(1.0)
    assert written["per_class"]["eight"] == {"AP": None, "AP50": None}


def test_best_f1_is_where_the_curves_say() -> None:
    """Down to a score of 0.5 both classes have precision 1 and recall 0.6; below, only chance is added."""
    recall = np.linspace(0, 1, 101)
    good = np.where(recall <= 0.6, 1.0, 0.1)
    scores = np.where(recall <= 0.6, 0.5, 0.2)
    point = PrecisionRecall(("a", "b"), recall, np.stack((good, good)), np.stack((scores, scores))).best_f1()
    assert (point.threshold, point.precision, point.recall) == (0.5, 1.0, pytest.approx(0.6))
    assert point.f1 == pytest.approx(0.75)


class Scripted(Selectable):
    """Returns one scripted output after the other; (B, Q, C + 1) logits and (B, Q, 4) boxes."""

    def __init__(self, outputs: list[tuple[Tensor, Tensor]], largest_batch: int = 99) -> None:
        super().__init__()
        self.config = MODELS["detr_tiny"]
        self.weight = torch.nn.Parameter(torch.zeros(()))  # a detector runs where it lies
        self.outputs = outputs
        self.largest_batch = largest_batch
        self.modes: list[bool] = []

    def forward(self, images: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        if len(images) > self.largest_batch:
            raise torch.OutOfMemoryError("no memory")
        self.modes.append(self.training)
        logits, boxes = self.outputs.pop(0)
        return {"pred_logits": logits, "pred_boxes": boxes}


@pytest.fixture
def dataset(shapes_root: Path) -> CocoDataset:
    return build_dataset(DataOptions(data=str(shapes_root)), "val", MODELS["detr_tiny"])


def perfect_outputs(dataset: CocoDataset, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """What a faultless model would return on `dataset`'s batches: each object once, the other queries no object."""
    outputs = []
    for batch in evaluation_loader(dataset, batch_size, workers=0):
        logits = torch.zeros(len(batch.image_ids), 10, 7)
        logits[..., 6] = 20
        boxes = torch.full((len(batch.image_ids), 10, 4), 0.5)
        for i, count in enumerate(batch.targets.count.tolist()):
            boxes[i, :count] = batch.targets.boxes_cxcywh[i, :count]
            logits[i, torch.arange(count), batch.targets.labels[i, :count]] = 40
        outputs.append((logits, boxes))
    return outputs


def test_a_perfect_model_has_average_precision_1(dataset: CocoDataset) -> None:
    model = Scripted(perfect_outputs(dataset, 4)).train()
    evaluation = evaluate_detector(Detector(model), dataset, evaluation_loader(dataset, 4, workers=0))
    assert evaluation.metrics["AP"] == pytest.approx(1.0)
    assert evaluation.operating_point.precision == evaluation.operating_point.recall == 1.0
    assert len(evaluation.detections) == 12 * 10
    assert model.modes == [False] * 3
    assert model.training


def test_batches_do_not_matter(dataset: CocoDataset) -> None:
    torch.manual_seed(0)
    model = build_model("detr_tiny")
    one, five = (
        collect_detections(Detector(model), evaluation_loader(dataset, size, workers=0), dataset.categories)
        for size in (1, 5)
    )
    np.testing.assert_allclose(one, five, rtol=1e-4, atol=1e-3)
    assert len(np.unique(one[:, 0])) == 12


def test_rows_are_in_the_order_of_ids_whatever_the_order_of_reading(dataset: CocoDataset) -> None:
    batches = list(evaluation_loader(dataset, 4, workers=0))
    outputs = perfect_outputs(dataset, 4)
    inorder, backwards = (
        collect_detections(Detector(Scripted(outputs[::step])), batches[::step], None) for step in (1, -1)
    )
    np.testing.assert_array_equal(inorder, backwards)
    assert inorder[::10, 0].tolist() == [record.id for record in dataset.records]


def test_labels_become_the_category_ids_of_the_data(dataset: CocoDataset) -> None:
    model = Scripted(perfect_outputs(dataset, 6))
    dataset.categories = tuple(reversed(dataset.categories or ()))
    evaluation = evaluate_detector(Detector(model), dataset, evaluation_loader(dataset, 6, workers=0))
    assert evaluation.metrics["AP"] < 0.3


def test_a_batch_too_large_for_the_memory_is_halved(dataset: CocoDataset) -> None:
    model = Scripted(perfect_outputs(dataset, 2), largest_batch=2)
    evaluation = evaluate_detector(Detector(model), dataset, evaluation_loader(dataset, 4, workers=0))
    assert evaluation.metrics["AP"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="does not fit into the device's memory"):
        evaluate_detector(Detector(Scripted([], largest_batch=0)), dataset, evaluation_loader(dataset, 4, workers=0))


@pytest.mark.parametrize(("place", "value"), [(0, float("nan")), (1, float("nan")), (1, float("inf"))])
def test_outputs_that_are_not_finite_are_an_error_that_names_the_images(
    dataset: CocoDataset, place: int, value: float
) -> None:
    outputs = perfect_outputs(dataset, 3)
    outputs[1][place][2, 0] = value
    with pytest.raises(UserError, match=r"not finite for image 5\."):
        evaluate_detector(Detector(Scripted(outputs)), dataset, evaluation_loader(dataset, 3, workers=0))


def test_images_that_cannot_be_read_are_left_out_with_a_warning(shapes_root: Path, tmp_path: Path) -> None:
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    document["images"].append({"id": 99, "file_name": "absent.jpg", "width": 64, "height": 64})
    document["annotations"].append({"id": 999, "image_id": 99, "category_id": 1, "bbox": [1, 1, 20, 20]})
    (tmp_path / "val.json").write_text(json.dumps(document))
    options = DataOptions(
        val_images=str(shapes_root / "val"), val_annotations=str(tmp_path / "val.json"), on_bad_image="skip"
    )
    dataset = build_dataset(options, "val", MODELS["detr_tiny"])
    model = Scripted(perfect_outputs(dataset, 6))
    with pytest.warns(UserWarning, match=r"without 1 images that could not be read: absent\.jpg"):
        evaluation = evaluate_detector(Detector(model), dataset, evaluation_loader(dataset, 6, workers=0))
    assert evaluation.metrics["AP"] == pytest.approx(1.0)


def test_a_class_that_the_data_lacks_is_an_error() -> None:
    categories = (Category(4, "a"), Category(9, "b"))
    assert category_ids(np.array([1.0, 0.0]), categories).tolist() == [9, 4]
    with pytest.raises(UserError, match="class 2, but the data has 2 classes"):
        category_ids(np.array([1.0, 2.0]), categories)


def test_processes_join_their_shares(dataset: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect_detections(
        Detector(Scripted(perfect_outputs(dataset, 6))), evaluation_loader(dataset, 6, workers=0), None
    )
    shares = [whole[:40], whole[40:]]

    def all_gather(into: list[np.ndarray], mine: np.ndarray) -> None:
        into[:] = shares

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather)
    np.testing.assert_array_equal(gather_rows(shares[0]), whole)


def test_the_referee_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"pip install 'detr-fast\[coco\]'"):
        evaluate.main(EvaluateOptions(weights="absent.pt", pycocotools=True))
