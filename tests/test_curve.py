"""Training curves and AP of ours and of the plain reference: what is the same counts as that, and what is not does
not."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detr_profiling.comparison import average_precision
from detr_profiling.comparison.average_precision import (
    AveragePrecision,
    Images,
    Score,
    checkpoint_and_images,
    judge_scores,
    plain_detections,
)
from detr_profiling.comparison.curve import Task, TrainingCurve, allowed_errors, make_task
from detr_profiling.comparison.variants import PRECISIONS
from detr_profiling.reference.weights import reference_of
from detr_profiling.workload import WorkloadRuntimeOptions

from detr_fast.config import model_config
from detr_fast.model.detr import DETR
from detr_fast.postprocess import postprocess
from detr_fast.runtime import choose_runtime
from detr_fast.training.build import make_step
from detr_fast.training.distributed import World
from detr_fast.training.step import TrainStep
from detr_fast.weights.container import write_container
from detr_fast.weights.files import ModelDescription

CPU = torch.device("cpu")
FP32 = WorkloadRuntimeOptions(device="cpu", precision="fp32")
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def task(shapes_root: Path) -> Task:
    return make_task(str(shapes_root), "detr_tiny", seed=0)


@pytest.fixture(scope="module")
def curve(task: Task) -> TrainingCurve:
    return TrainingCurve(task, CPU, STEPS)


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "running statistics"])
def test_the_reference_has_the_tiny_backbone_too(training: bool) -> None:
    """In float64, where nothing but the float32 outputs of ours is rounded."""
    torch.manual_seed(0)
    model = DETR(model_config("detr_tiny"))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    reference, model = reference_of(model).double().train(training), model.double().train(training)
    images, mask = torch.randn(3, 3, 61, 72, dtype=torch.float64), torch.zeros(3, 61, 72, dtype=torch.bool)
    mask[1, 40:], mask[2, :, 50:] = True, True
    found, exact = model(images, mask), reference(images, mask)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(found[name].double(), exact[name], rtol=0, atol=1e-6)
    names = ("backbone.bn1", "backbone.0.body.bn1")
    ours, plain = (each.get_submodule(name).running_var for each, name in zip((model, reference), names, strict=True))
    torch.testing.assert_close(ours, plain)


def test_ours_learns_as_the_reference_does(curve: TrainingCurve) -> None:
    for name in PRECISIONS:
        curve.add(name, FP32.but(precision=name))
    result = curve.to_dict()
    assert result["close"] and result["losses"].keys() == {"reference", "reference bf16", "fp32", "bf16"}
    assert result["reference"][-1] < 0.95 * result["reference"][0]
    assert result["losses"]["fp32"][:2] == pytest.approx(result["reference"][:2], rel=2e-4)
    assert result["allowed"]["fp32"][0] < 1.1e-5 < result["allowed"]["bf16"][0]


def test_what_is_allowed_doubles_after_the_second_step() -> None:
    assert allowed_errors([1e-3, 2e-3, *[9.0] * 8]) == pytest.approx(
        [2e-3 + 1e-5, *((4e-3 + 5e-4) * 2**step for step in range(8)), 1.0]
    )
    assert allowed_errors([0.0, 0.0]) == [1e-5, 5e-4]


def step_with(**changes: float) -> Callable[..., TrainStep]:
    def make(model: DETR, config: Any, *rest: Any) -> TrainStep:
        return make_step(model, config.but(**changes), *rest)

    return make


@pytest.mark.parametrize(
    ("changes", "step"), [({"no_object_weight": 0.101}, 1), ({"lr": 4e-4, "lr_backbone": 4e-4}, 2)], ids=str
)
def test_another_recipe(
    changes: dict[str, float], step: int, curve: TrainingCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is off by a percent shows in the first loss, the learning rate after a step."""
    spoilt = copy.copy(curve)
    spoilt.losses, spoilt.failures = {}, {}
    monkeypatch.setattr("detr_profiling.comparison.curve.make_step", step_with(**changes))
    spoilt.add("fp32", FP32)
    assert f"loss at step {step}: NOT close" in spoilt.failures["fp32"] and not spoilt.to_dict()["close"]


def test_a_loss_that_is_not_finite_is_not_close(curve: TrainingCurve) -> None:
    exact = [step["loss"].item() for step in curve.reference]
    assert curve.judge(exact, curve.allowed["fp32"]) is None
    for value in (math.nan, math.inf):
        assert "step 3" in str(curve.judge([*exact[:2], value, exact[3]], curve.allowed["fp32"]))


@pytest.fixture(scope="module")
def trained(task: Task) -> DETR:
    """Long enough to find some of the objects of the images that it has seen."""
    model = copy.deepcopy(task.model).train()
    config = task.config.but(lr=2e-3, lr_backbone=2e-3, device="cpu", precision="fp32")
    step = make_step(model, config, choose_runtime(config.runtime), World(), None)
    for _ in range(40):
        step([task.batch])
    return model.eval()


@pytest.fixture
def images(task: Task) -> Images:
    return Images("twelve", task.dataset, lambda: [task.batch])


def test_the_same_weights_have_the_same_ap(trained: DETR, images: Images) -> None:
    ap = AveragePrecision(trained, images, CPU)
    for name in PRECISIONS:
        ap.add(name, FP32.but(precision=name))
    result = ap.to_dict()
    assert result["close"] and result["images"] == 12
    rows = {row["name"]: row["AP50"] for row in result["rows"]}
    assert rows.keys() == {"reference", "fp32", "bf16"}
    assert rows["fp32"] == pytest.approx(rows["reference"], abs=1e-6) and rows["reference"] > 0.02
    assert {each["name"] for each in result["classes"]} == {each.name for each in images.dataset.categories or ()}


def test_boxes_that_are_off_by_a_tenth(trained: DETR, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    ap, collect = AveragePrecision(trained, images, CPU), average_precision.collect_detections

    def shift(*arguments: Any) -> np.ndarray:
        rows = collect(*arguments)
        rows[:, 1] += 0.1 * rows[:, 3]
        return rows

    monkeypatch.setattr(average_precision, "collect_detections", shift)
    ap.add("fp32", FP32)
    assert "NOT close" in ap.failures["fp32"] and not ap.to_dict()["close"]


def test_nan_is_a_failure_and_never_an_ap(trained: DETR, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    ap = AveragePrecision(trained, images, CPU)
    copy_of = average_precision.copy_of

    def broken(model: DETR) -> DETR:
        model = copy_of(model)
        model.class_embed.bias.data[0] = math.nan
        return model

    monkeypatch.setattr(average_precision, "copy_of", broken)
    ap.add("fp32", FP32)
    result = ap.to_dict()
    (row,) = [row for row in result["rows"] if row["name"] == "fp32"]
    assert row == {"name": "fp32", "AP": None, "AP50": None} and not result["close"]
    assert "fp32: The model's scores or boxes are not finite" in result["message"]


def test_weights_that_hold_nan_have_no_ap_anywhere(trained: DETR, images: Images) -> None:
    broken = copy.deepcopy(trained)
    broken.get_parameter("bbox_embed.layers.2.bias").data[:] = math.nan
    ap = AveragePrecision(broken, images, CPU)
    for precision in PRECISIONS:
        ap.add(precision, FP32.but(precision=precision))
    result = ap.to_dict()
    assert not result["close"] and result["images"] == 0 and all(row["AP"] is None for row in result["rows"])


def test_detections_are_ours() -> None:
    logits, boxes = torch.randn(2, 7, 5), torch.rand(2, 7, 4)
    sizes = torch.tensor([[40, 80], [33, 21]])
    for found, exact in zip(plain_detections(logits, boxes, sizes), postprocess(logits, boxes, sizes), strict=True):
        torch.testing.assert_close(found, exact)


def score_of(a: float, b: float, objects: int = 10_000) -> Score:
    classes = {name: {"AP": value, "AP50": value} for name, value in {"a": a, "b": b, "absent": -1.0}.items()}
    return Score((a + b) / 2, (a + b) / 2, classes, {"a": objects, "b": objects}, 5)


def test_a_class_without_objects_has_no_number(trained: DETR, images: Images) -> None:
    ap = AveragePrecision(trained, images, CPU)
    ap.scores = {"reference": score_of(0.5, 0.5)}
    assert ap.to_dict()["classes"][2] == {"name": "absent", "AP": None, "by_row": {"reference": None}}


def test_every_class_is_judged_and_not_their_mean_alone() -> None:
    exact = score_of(0.5, 0.5)
    assert judge_scores(score_of(0.5009, 0.4991), exact, "fp32") is None
    swapped = score_of(0.51, 0.49)  # its mean did not move, by luck
    assert "AP of a: NOT close" in str(judge_scores(swapped, exact, "fp32"))
    assert "AP: NOT close" in str(judge_scores(score_of(0.515, 0.5), exact, "fp32"))
    assert "NOT close" in str(judge_scores(score_of(math.nan, 0.5), exact, "fp32"))


def test_in_bf16_a_hundredth_and_one_object_may_fall_either_way() -> None:
    exact, few = score_of(0.5, 0.5), score_of(0.5, 0.5, objects=20)
    assert judge_scores(score_of(0.509, 0.491), exact, "bf16") is None
    assert "AP of a: NOT close" in str(judge_scores(score_of(0.512, 0.5), exact, "bf16"))
    moved = score_of(0.54, 0.5, objects=20)
    assert judge_scores(moved, few, "bf16") is None and "NOT close" in str(judge_scores(moved, few, "fp32"))
    assert "NOT close" in str(judge_scores(score_of(0.6, 0.5, objects=20), few, "bf16"))


def test_a_checkpoint_on_a_whole_data_set(trained: DETR, task: Task, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    description = ModelDescription.of(trained.config, task.dataset.categories)
    write_container(path, description.with_weights(trained.state_dict()))
    model, images = checkpoint_and_images(str(path), task.config.dataset.data)
    ap = AveragePrecision(model, images, CPU)
    ap.add("fp32", FP32)
    assert ap.to_dict()["close"] and ap.to_dict()["images"] == 12
