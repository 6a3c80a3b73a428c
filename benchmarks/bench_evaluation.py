"""COCO's numbers from detections, and detections from a model:
`pytest benchmarks/bench_evaluation.py --benchmark-only`.

hotcoco against pycocotools on synthetic detections: the twelve numbers must be equal, to the last bit. A model run over
a small data set, from its JPEG files to the numbers: its scores and boxes must be as close to float64 as those of plain
eager code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detr_profiling.comparison.closeness import assert_close, scaled_tolerance
from detr_profiling.own_workload import initial_model
from detr_profiling.workload import WorkloadOptions
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.clock import DEVICE, Size, Verdict, time_case
from benchmarks.photographs import PHOTOGRAPHS
from benchmarks.workload_cases import precisions
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.detector import Detector, place
from detr_fast.evaluation.coco_metrics import Evaluator, evaluate_detections, evaluate_detector
from detr_fast.evaluation.referee import run_pycocotools
from detr_fast.options import DataOptions
from detr_fast.runtime import Runtime, choose_runtime

CPU = torch.device("cpu")
CATEGORIES = {"small": 20, "full": 80}
OBJECTS, DETECTIONS = 7, 100
"""On each image."""


@dataclass(frozen=True)
class EvaluatorCase:
    name: str
    evaluator: Evaluator | None
    """None: the one that evaluation takes."""
    images: int
    categories: int
    precision: str = "fp64"
    size: str = "480x640"

    @property
    def group(self) -> str:
        return f"COCO's numbers, {self.categories} classes, b{self.images}"


def evaluator_cases(size: Size) -> Iterator[EvaluatorCase]:
    images = 500 if size == "full" else 100
    for name, evaluator in (("hotcoco", None), ("pycocotools", run_pycocotools)):
        yield EvaluatorCase(name, evaluator, images, CATEGORIES[size])


def synthetic_detections(images: int, categories: int) -> tuple[dict[str, Any], np.ndarray]:
    """Draw a COCO document, and rows (N, 7) as evaluators read them.

    Each object is found once, a little aside; other rows are false.
    """
    rng = np.random.default_rng(0)
    corner, extent = rng.uniform(0, 400, (images, OBJECTS, 2)), np.exp(rng.uniform(2, 5.3, (images, OBJECTS, 2)))
    boxes, labels = np.concatenate((corner, extent), -1), rng.integers(1, categories + 1, (images, OBJECTS))
    annotations = [
        {"id": number, "image_id": number // OBJECTS + 1, "category_id": int(label), "bbox": box.tolist(), "iscrowd": 0}
        | {"area": float(box[2] * box[3])}
        for number, (label, box) in enumerate(zip(labels.reshape(-1), boxes.reshape(-1, 4), strict=True), 1)
    ]
    aside = np.concatenate((corner + extent * rng.uniform(-0.2, 0.2, extent.shape), extent), -1)
    false = rng.uniform(1, 400, (images, DETECTIONS - OBJECTS, 4))
    found = np.concatenate((aside, false), 1)
    classes = np.concatenate((labels, rng.integers(1, categories + 1, false.shape[:2])), 1)
    scores = np.concatenate((rng.uniform(0.3, 1, labels.shape), rng.uniform(0, 0.6, false.shape[:2])), 1)
    ids = np.broadcast_to(np.arange(1, images + 1)[:, None], scores.shape)
    rows = np.concatenate((ids[..., None], found, scores[..., None], classes[..., None]), -1).reshape(-1, 7)
    document = {
        "images": [{"id": number, "width": 640, "height": 480} for number in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, categories + 1)],
    }
    return document, rows


def bench_evaluator(benchmark: BenchmarkFixture, evaluator_case: EvaluatorCase) -> None:
    document, rows = synthetic_detections(evaluator_case.images, evaluator_case.categories)
    fast, referee = (evaluate_detections(document, rows, each).metrics for each in (None, run_pycocotools))
    error = max(abs(fast[name] - referee[name]) for name in referee)
    assert fast == referee, f"the twelve numbers differ by up to {error}"
    assert 0.05 < referee["AP"] < 0.95, "equality would prove little"
    verdict = Verdict("the twelve numbers", error, 0.0)
    run = lambda: evaluate_detections(document, rows, evaluator_case.evaluator)  # noqa: E731
    time_case(benchmark, evaluator_case, verdict, run, CPU)


@dataclass(frozen=True)
class ModelCase:
    """A model with random weights over a data set's val split."""

    model: str
    precision: str
    data: str
    """The fixture that makes it."""
    size: str
    images: int

    @property
    def name(self) -> str:
        return self.model.replace("_", "-")

    @property
    def group(self) -> str:
        return f"evaluation of {self.model}, {self.size}, b{self.images}"


def model_cases(size: Size) -> Iterator[ModelCase]:
    for precision in precisions():
        yield ModelCase("detr_tiny", precision, "shapes_root", "64x64", 64)
        if DEVICE.type == "cuda" or size == "full":
            yield ModelCase("detr_r50", precision, "photographs_root", "800x1066", PHOTOGRAPHS)


def bench_model(benchmark: BenchmarkFixture, model_case: ModelCase, request: Any) -> None:
    root: Path = request.getfixturevalue(model_case.data)
    precision: Any = "fp32" if model_case.precision == "tf32" else model_case.precision
    options = WorkloadOptions.of(model=model_case.model, precision=precision)
    detector = build(options)
    dataset = build_dataset(DataOptions(data=str(root)), "val", detector.config)
    assert len(dataset) == model_case.images
    verdict = judge(options, dataset)

    def run() -> None:
        evaluate_detector(detector, dataset, load(dataset, detector.runtime))

    time_case(benchmark, model_case, verdict, run)


def build(options: WorkloadOptions) -> Detector:
    runtime = choose_runtime(options.runtime)
    return Detector(place(initial_model(options), runtime), runtime=runtime)


def load(dataset: CocoDataset, runtime: Runtime) -> Any:
    return evaluation_loader(dataset, 16, runtime.workers(None), runtime.device.type == "cuda")


def judge(options: WorkloadOptions, dataset: CocoDataset) -> Verdict:
    """Compare scores and boxes of all images with those of DETR's own order of operations in float64."""
    plain = options.but(kernels="ref", attention="ref")
    found, eager = (detections(build(each), dataset, torch.float32) for each in (options, plain))
    exact = detections(build(plain.but(precision="fp32")), dataset, torch.float64)
    judged = [
        (name, assert_close(a, b, c, scaled_tolerance(b, 1e-5), name))
        for name, a, b, c in zip(("scores", "boxes"), found, exact, eager, strict=True)
    ]
    name, worst = max(judged, key=lambda pair: pair[1].error / pair[1].allowed)
    return Verdict(name, worst.error, worst.allowed)


def detections(detector: Detector, dataset: CocoDataset, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scores (N, Q) and boxes (N, Q, 4) in pixels, of the model's weights in `dtype`.

    A class that changes between two of like score does not show.
    """
    detector.network.to(dtype).register_forward_pre_hook(lambda _, given: (given[0].to(dtype), *given[1:]))
    found = [detector.detect(batch) for batch in load(dataset, detector.runtime)]
    scores, _, boxes = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(boxes)
