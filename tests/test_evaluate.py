"""The commands evaluate and predict from the shell's side: options in; files, tables and exit codes out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import evaluate, predict
from detr_fast.command import run
from detr_fast.config import EvaluateConfig, PredictConfig
from detr_fast.data.coco import Category
from detr_fast.data.shapes import CLASSES
from detr_fast.evaluation.coco_metrics import METRICS
from detr_fast.export import write_weights
from detr_fast.weights import build_model

SHAPES = tuple(Category(number, name) for number, name in enumerate(CLASSES, 1))


def write_model(path: Path, categories: tuple[Category, ...] | None) -> Path:
    torch.manual_seed(0)
    model = build_model("detr_tiny", num_classes=len(categories) if categories else 6)
    torch.nn.init.normal_(model.class_embed.weight, std=2)  # some scores are high, so that boxes are drawn
    model.categories = categories
    write_weights(model, path, "detr_fast")
    return path


def run_evaluate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run(evaluate.main, EvaluateConfig, argv=[*map(str, arguments), "--device", "cpu", "--workers", "0"])
    return int(stopped.value.code or 0)


def run_predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run(predict.main, PredictConfig, argv=[*map(str, arguments), "--device", "cpu"])
    return int(stopped.value.code or 0)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.safetensors", SHAPES)


def test_evaluate_writes_numbers_and_pictures(
    weights: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_evaluate("--weights", weights, "--data", shapes_root, "--output", out, "--batch-size", 5) == 0
    numbers = json.loads((out / "evaluation.json").read_text())
    assert set(METRICS) < set(numbers)
    assert list(numbers["per_class"]) == list(CLASSES)
    assert set(numbers["at_best_f1"]) == {"threshold", "precision", "recall", "f1"}
    assert Image.open(out / "plots" / "precision_recall.png").width > 800
    assert Image.open(out / "plots" / "detections.png").width > 1600
    printed = capsys.readouterr().out
    assert "attention  sdpa (" in printed  # each choice with its name and its reason
    assert f"{numbers['AP']:.3f}" in printed
    assert all(name in printed for name in (*METRICS, *CLASSES))


def test_evaluate_shows_class_names_as_they_are(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("<script>", "$x$", "[/red]", "[bold]x", "_", "$\\frac{$")
    categories = tuple(Category(number, name) for number, name in enumerate(names, 1))
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    document["categories"] = [vars(category) for category in categories]
    (tmp_path / "val.json").write_text(json.dumps(document))
    weights = write_model(tmp_path / "model.safetensors", categories)
    data = ("--val-images", shapes_root / "val", "--val-annotations", tmp_path / "val.json")
    assert run_evaluate("--weights", weights, *data, "--output", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())["per_class"]) == list(names)


def test_evaluate_says_what_cannot_be_measured_and_shows_no_number_for_it(
    weights: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps({**document, "annotations": []}))
    data = ("--val-images", shapes_root / "val", "--val-annotations", tmp_path / "val.json")
    with pytest.warns(UserWarning, match=r"val\.json: there is no object to find.*No AP is measured"):
        assert run_evaluate("--weights", weights, *data, "--output", tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "-1.000" not in printed and "no object to find" in printed
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["AP"] is None


def test_evaluate_names_all_missing_images_at_once_and_areas_that_cannot_be(
    weights: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    document["annotations"][0]["area"] = 0
    for image in document["images"][:3]:
        image["file_name"] = f"absent{image['id']}.jpg"
    (tmp_path / "val.json").write_text(json.dumps(document))
    data = ("--val-images", shapes_root / "val", "--val-annotations", tmp_path / "val.json")
    options = ("--weights", weights, *data, "--output", tmp_path / "out")
    assert run_evaluate(*options) == 2
    assert "3 of 12 image files are missing" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="3 of 12 image files are missing"):
        assert run_evaluate(*options, "--on-bad-image", "skip") == 0
    assert "1 areas are 0" in capsys.readouterr().out


def test_evaluate_refuses_data_of_other_classes(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = (Category(1, "dog"), *SHAPES[1:])
    weights = write_model(tmp_path / "other.safetensors", renamed)
    assert run_evaluate("--weights", weights, "--data", shapes_root) == 2
    assert "does not know these categories: 1 'circle'" in capsys.readouterr().err
    weights = write_model(tmp_path / "unnamed.safetensors", None)
    assert run_evaluate("--weights", weights, "--data", shapes_root) == 2
    assert "category ids up to 6" in capsys.readouterr().err


def test_evaluate_names_missing_weights_and_splits(
    weights: Path, shapes_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluate("--weights", "no-such.pth", "--data", shapes_root) == 2
    assert "no-such.pth" in capsys.readouterr().err
    assert run_evaluate("--weights", weights, "--data", shapes_root, "--split", "test") == 2
    assert "test" in capsys.readouterr().err


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (60, 90, 3)), ("a.PNG", (64, 64, 3)), ("c$x$.png", (120, 40, 3))):
        Image.fromarray(rng.integers(0, 256, size=size, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2])
def test_predict_writes_json_and_pictures(
    weights: Path, photographs: Path, tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--out", out, "--threshold", 0.2, "--batch-size", batch_size)
    assert run_predict(photographs, "--weights", weights, *options) == 0
    entries = json.loads((out / "predictions.json").read_text())
    sizes = [(one["file_name"], one["width"], one["height"]) for one in entries]
    assert sizes == [("a.PNG", 64, 64), ("a.jpg", 90, 60), ("c$x$.png", 40, 120)]
    detections = [found for one in entries for found in one["detections"]]
    assert len(detections) > 0
    assert {found["name"] for found in detections} <= set(CLASSES)
    assert min(found["score"] for found in detections) >= 0.2
    pictures = sorted(file.name for file in (out / "pictures").iterdir())
    assert pictures == ["a.PNG.png", "a.jpg.png", "c$x$.png.png"]
    assert f"{len(detections)} objects on 3 images" in capsys.readouterr().out


def test_predict_takes_a_single_image(weights: Path, photographs: Path, tmp_path: Path) -> None:
    assert run_predict(photographs / "a.jpg", "--weights", weights, "--out", tmp_path / "out") == 0
    assert [one["file_name"] for one in json.loads((tmp_path / "out" / "predictions.json").read_text())] == ["a.jpg"]


def test_predict_leaves_its_input_alone(weights: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in photographs.iterdir()}
    assert run_predict(photographs, "--weights", weights, "--out", photographs) == 0
    inside = photographs / "pictures"
    assert run_predict(photographs, "--weights", weights, "--out", photographs) == 0
    assert {name: (photographs / name).read_bytes() for name in before} == before
    assert len(list(inside.iterdir())) == 3
    capsys.readouterr()
    assert run_predict(inside, "--weights", weights, "--out", photographs) == 2
    assert "among the images that are read" in capsys.readouterr().err


def test_predict_names_a_bad_image_and_goes_on(
    weights: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "b.jpg").write_text("<html></html>")
    assert run_predict(photographs, "--weights", weights, "--out", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "b.jpg" in captured.err
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3


def test_predict_names_what_is_missing(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predict(tmp_path / "nothing", "--weights", weights) == 2
    assert "nothing: there is no such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_predict(tmp_path / "empty", "--weights", weights) == 2
    assert "no images in this folder" in capsys.readouterr().err
