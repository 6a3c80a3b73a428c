"""The commands evaluate and predict from the shell's side: options in; files, tables and exit codes out."""

import json
import os
import re
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import Detector, evaluate, predict
from detr_fast.command import run
from detr_fast.config import MODELS, UserError
from detr_fast.data.coco import Category, build_dataset
from detr_fast.data.shapes import CLASSES
from detr_fast.evaluation.coco_metrics import METRICS, category_names, evaluate_detections
from detr_fast.evaluation.pictures import Picture
from detr_fast.evaluation.predictions_file import PredictionsFile
from detr_fast.evaluation.report import pictures
from detr_fast.export import write_weights
from detr_fast.options import DataOptions, EvaluateOptions, PredictOptions
from detr_fast.weights import build_model

SHAPES = tuple(Category(number, name) for number, name in enumerate(CLASSES, 1))


def write_model(path: Path, categories: tuple[Category, ...] | None) -> Path:
    torch.manual_seed(0)
    model = build_model("detr_tiny", num_classes=len(categories) if categories else 6)
    torch.nn.init.normal_(model.class_embed.weight, std=2)  # some scores are high, so that boxes are drawn
    write_weights(Detector(model, categories), path, "detr_fast")
    return path


def run_evaluate(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run(evaluate.main, EvaluateOptions, argv=[*map(str, arguments), "--device", "cpu", "--workers", "0"])
    return int(stopped.value.code or 0)


def run_predict(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run(predict.main, PredictOptions, argv=[*map(str, arguments), "--device", "cpu"])
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
    assert re.search(r"attention  (sdpa|blocked) \(", printed)  # each choice with its name and its reason
    assert f"{numbers['AP']:.3f}" in printed
    assert all(name in printed for name in (*METRICS, *CLASSES))


def test_evaluate_gives_the_same_numbers_by_cocos_own_tool(weights: Path, shapes_root: Path, tmp_path: Path) -> None:
    given = ("--weights", weights, "--data", shapes_root, "--device", "cpu")
    for name, flag in (("ours", "--no-pycocotools"), ("coco", "--pycocotools")):
        assert run_evaluate(*given, "--output", tmp_path / name, flag) == 0
    assert (tmp_path / "ours" / "evaluation.json").read_text() == (tmp_path / "coco" / "evaluation.json").read_text()


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
    assert "3 of 12 images have no file" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="3 of 12 images have no file"):
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
    options = ("--output", out, "--threshold", 0.2, "--batch-size", batch_size)
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
    assert run_predict(photographs / "a.jpg", "--weights", weights, "--output", tmp_path / "out") == 0
    assert [one["file_name"] for one in json.loads((tmp_path / "out" / "predictions.json").read_text())] == ["a.jpg"]


def test_predict_leaves_its_input_alone(weights: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in photographs.iterdir()}
    assert run_predict(photographs, "--weights", weights, "--output", photographs) == 0
    inside = photographs / "pictures"
    assert run_predict(photographs, "--weights", weights, "--output", photographs) == 0
    assert {name: (photographs / name).read_bytes() for name in before} == before
    assert len(list(inside.iterdir())) == 3
    capsys.readouterr()
    assert run_predict(inside, "--weights", weights, "--output", photographs) == 2
    assert "among the images that are read" in capsys.readouterr().err


def test_predict_names_a_bad_image_and_goes_on(
    weights: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "b.jpg").write_text("<html></html>")
    assert run_predict(photographs, "--weights", weights, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "b.jpg" in captured.err
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3


def test_predict_names_what_is_missing(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_predict(tmp_path / "nothing", "--weights", weights) == 2
    assert "nothing: there is no such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_predict(tmp_path / "empty", "--weights", weights) == 2
    assert "no images in this folder" in capsys.readouterr().err


def test_a_folder_is_done_by_content_and_the_rest_is_named(
    weights: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(photographs / "a.jpg").copy()
    for name, format in (("d.jfif", "JPEG"), ("e", "PNG"), ("f.img", "WEBP"), ("g.avif", "AVIF")):
        image.save(photographs / name, format)
    image.save(photographs / "h.mpo", "MPO", save_all=True, append_images=[image])
    (photographs / "k.jpg").symlink_to("nowhere.jpg")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    for name, data in (("i.HEIC", heic), ("j.jpg", heic), ("._a.jpg", b"\0\5\26\7"), ("m.mp4", b"\0\0\0 ftypisom")):
        (photographs / name).write_bytes(data)
    for number in range(8):
        (photographs / f"{number}.json").write_text("{}")
    (photographs / "inner").mkdir()
    os.mkfifo(photographs / "pipe")
    assert run_predict(photographs, "--weights", weights, "--output", tmp_path / "out", "--batch-size", 4) == 2
    done = [one["file_name"] for one in json.loads((tmp_path / "out" / "predictions.json").read_text())]
    assert done == ["a.PNG", "a.jpg", "c$x$.png", "d.jfif", "e", "f.img", "g.avif", "h.mpo"]
    told = capsys.readouterr().err
    assert "j.jpg: cannot be decoded (a HEIC" in told and "k.jpg: the image file is missing" in told
    assert "i.HEIC (a HEIC, which is not read: convert it to JPEG or PNG)" in told
    assert "9 files: 0.json, 1.json, 2.json, 3.json, 4.json and 4 more (not an image of a known format)" in told
    for name in ("inner (folders", "pipe (", "._a.jpg (", "m.mp4 (a video"):
        assert name in told
    assert "--on-bad-image" not in told


def test_a_folder_without_images_says_what_is_in_it(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scan.pdf").write_bytes(b"%PDF-1.7")
    assert run_predict(tmp_path, "--weights", weights) == 2
    assert "scan.pdf (a PDF: convert it to JPEG or PNG)" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Some letters in pictures are escaped")
def test_names_of_any_bytes_are_done(weights: Path, photographs: Path, tmp_path: Path) -> None:
    names = sorted(
        (os.fsdecode(b"caf\xe9.jpg"), "a\nb\t.jpg", "\u7ec4[bold].jpg", "\u0634\u0643.jpg", "\U0001f600.jpg")
    )
    for name in names:
        (photographs / name).hardlink_to(photographs / "a.jpg")
    out = tmp_path / os.fsdecode(b"out\xe9 [/x]")
    assert run_predict(photographs, "--weights", weights, "--output", out) == 0
    done = [one["file_name"] for one in json.loads((out / "predictions.json").read_text())]
    assert done == sorted(["a.PNG", "a.jpg", "c$x$.png", *names])
    assert len(list((out / "pictures").iterdir())) == len(done)


def test_a_picture_that_cannot_be_written_is_that_images_fault(
    weights: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "a.jpg").rename(photographs / f"{'b' * 250}.jpg")
    assert run_predict(photographs, "--weights", weights, "--output", tmp_path / "out") == 2
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 3
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert "3 images, 1 with an error" in capsys.readouterr().out


def test_a_run_that_dies_leaves_what_it_had_found(
    weights: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise SystemExit(1)

    file, seen = tmp_path / "out" / "predictions.json", []
    real = predict.draw_detections

    def draw_and_look(pictures: list[Picture], path: Path, **options: Any) -> None:
        real(pictures, path, **options)
        seen.append(len(json.loads(file.read_text())))

    monkeypatch.setattr(predict, "draw_detections", draw_and_look)
    monkeypatch.setattr(PredictionsFile, "finish", die)
    assert run_predict(photographs, "--weights", weights, "--output", file.parent) == 1
    assert seen == [1, 2, 3] == [*range(1, 1 + len(json.loads(file.read_text())))]


def test_a_full_disk_leaves_what_was_written_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PredictionsFile(tmp_path / "predictions.json")
    with file:
        file.add([{"file_name": "b"}, {"file_name": "a"}])
        before = file.path.read_bytes()
        real = file._file
        assert real is not None
        full = [5, None]  # bytes that still fit

        class Full(FileIO):
            def write(self, data: Any) -> int:
                return super().write(data[: full.pop(0)])

        file._file = Full(file.path, "r+")
        with pytest.raises(UserError, match=r"predictions\.json cannot be written: No space"):
            file.add([{"file_name": "c"}])
        assert file.path.read_bytes() == before
        file.finish()
    assert [one["file_name"] for one in json.loads(file.path.read_text())] == ["a", "b"]
    real.close()


def test_a_folder_that_cannot_be_written_is_said_before_the_work(
    weights: Path, shapes_root: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((evaluate, "evaluate_detector"), (predict, "prediction_batches")):
        monkeypatch.setattr(module, name, None)  # which would raise
    out = weights / "out"
    assert run_evaluate("--weights", weights, "--data", shapes_root, "--output", out) == 2
    assert run_predict(photographs, "--weights", weights, "--output", out) == 2


def test_evaluation_pictures_are_without_an_image_that_was_taken_away(shapes_root: Path) -> None:
    data = build_dataset(DataOptions(data=str(shapes_root)), "val", MODELS["detr_tiny"])
    data.records = [replace(data.records[0], path=shapes_root / "gone.jpg"), data.records[1]]
    names = category_names(data.coco_document()["categories"])
    rows = np.array([[record.id, 1, 1, 9, 9, 0.9, 1] for record in data.records])
    with pytest.warns(UserWarning, match=r"gone\.jpg"):
        shown = pictures(evaluate_detections(data.coco_document(), rows), data, names)
    assert [each.title for each in shown] == [data.records[1].path.name]


def test_predict_says_which_pictures_are_older(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(images / name)
    assert run_predict(images, "--weights", weights, "--output", out) == 0
    assert "older" not in capsys.readouterr().out
    (images / "a.png").unlink()
    assert run_predict(images, "--weights", weights, "--output", out) == 0
    said = capsys.readouterr().out
    assert "older pictures" in said and said.rstrip().endswith("pictures: a.png.png")
    assert (out / "pictures" / "a.png.png").exists()  # a person may have put one there
