"""Whether a run will learn is said before it: nothing of one that does, and of each fault what mends it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fast.check_data import CheckDataOptions, default_options
from detr_fast.command import parsed
from detr_fast.config import MODELS, ModelConfig
from detr_fast.data.coco import CocoDataset, training_transform
from detr_fast.model.backbone import build_backbone, token_stride
from detr_fast.training.advice import Length, Row, judge, warn
from detr_fast.training.batch_size import with_batches

Judged = Callable[..., dict[str, Row]]
SAID = "This run is unlikely to learn. "
UPDATES, WIDTH, QUERIES, CLASSES, EMPTY = (
    *("updates", "width of an object", "objects an image"),
    *("objects a class", "images without objects"),
)


def photographs(file: Path, images: int = 300, side_px: int = 150, objects: int = 2, **planted: Any) -> None:
    """Photographs of 480 x 360 whose objects are squares of `side_px`, of the classes in turns."""
    classes, empty = planted.get("classes", 3), planted.get("empty", 0)
    rows = [
        {"id": 0, "image_id": image, "category_id": (image + k) % classes, "bbox": [k, k, side_px, side_px]}
        for image in range(images - empty)
        for k in range(objects)
    ]
    rows = [row | {"id": number, "area": side_px**2, "iscrowd": 0} for number, row in enumerate(rows, 1)]
    names = [f"class {k}" for k in range(classes + planted.get("unused", 0))]
    document = {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 480, "height": 360} for k in range(images)],
        "annotations": rows,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }
    file.write_text(json.dumps(document))


@pytest.fixture
def judged(tmp_path: Path) -> Judged:
    """Judges a command line on photographs, by row; warns as `train` does."""

    def of(line: str, data: str = "DATA", pace: float = 0.0, **made: Any) -> dict[str, Row]:
        argv = ["--data", data, *line.split()]
        options = parsed(CheckDataOptions, argv, default_options(argv)).training()
        file = tmp_path / "train.json"
        photographs(file, **made)
        config = options.network.config(**options.dataset.sizes_given())
        dataset = CocoDataset(tmp_path, file, training_transform(options.augmentation, config.max_size))
        options = with_batches(options, config, "cpu", 1, len(dataset))
        length = Length.of(options.optimizer, len(dataset), 1, pace)
        rows = judge(options, config, dataset, length)
        warn(rows)
        return {row.what: row for row in rows}

    return of


FINE = [
    ("--model detr_lite", {}),
    ("--model detr_lite --minutes 10", {}),
    ("--model detr_lite", {"images": 205, "side_px": 76, "objects": 28}),  # blood cells
    ("--model detr_r50 --weights some.pth --epochs 3", {}),
    ("--epochs 1000", {"images": 5000, "objects": 20, "side_px": 40}),
    ("--model detr_lite --weights some.pth --minutes 1", {"side_px": 40}),
]


@pytest.mark.parametrize(("line", "made"), FINE)
def test_of_a_run_that_learns_nothing_is_said(judged: Judged, line: str, made: dict[str, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = judged(line, **made)
    assert len(rows) == 5 and {row.verdict for row in rows.values()} <= {"fine", "depends"}
    assert not any(row.change for row in rows.values())


def test_the_embedded_data_and_its_recipe_are_fine(judged: Judged) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line, data, tokens in (("", "shapes:128", 16), ("--model detr_tiny", "shapes:64", 8)):
            made: dict[str, Any] = {"data": data, "images": 8000, "side_px": 180}
            rows = judged(line, **made)
            assert judged(f"{line} --epochs 1", **made)[UPDATES].verdict == "doubtful"
            assert {row.verdict for row in rows.values()} == {"fine"} and f"tokens of {tokens} " in rows[WIDTH].here


FAULTS = [
    ("--model detr_lite --epochs 2", {}, UPDATES, "will not do", "--epochs 17 "),
    ("--model detr_lite --epochs 8", {}, UPDATES, "doubtful", "--epochs 17 "),
    ("--epochs 300", {}, UPDATES, "will not do", "--model detr_lite"),
    ("--model detr_lite", {"side_px": 40}, WIDTH, "will not do", "--train-sizes "),
    ("--model detr_lite", {"side_px": 70}, WIDTH, "doubtful", "--train-sizes "),
    ("--model detr_lite --token-stride 32", {"side_px": 70}, WIDTH, "will not do", "--token-stride 16"),
    ("--model detr_r50", {"side_px": 20}, WIDTH, "will not do", "--model detr_lite"),
    ("--model detr_lite", {"side_px": 10}, WIDTH, "will not do", "tiles"),
    ("--model detr_lite --weights some.pth", {"side_px": 12}, WIDTH, "doubtful", "tiles"),
    ("--model detr_lite", {"objects": 61}, QUERIES, "will not do", "--num-queries 122"),
    ("--model detr_r50", {}, QUERIES, "doubtful", "--num-queries 4:"),
    ("--model detr_lite", {"classes": 50}, CLASSES, "doubtful", "add images"),
    ("--model detr_lite", {"unused": 2}, CLASSES, "doubtful", "add images"),
    ("--model detr_lite", {"empty": 290}, EMPTY, "will not do", "about 10 of them"),
    ("--model detr_lite", {"empty": 160}, EMPTY, "doubtful", "about 140 of them"),
]


@pytest.mark.parametrize(("line", "made", "what", "verdict", "change"), FAULTS)
def test_each_fault_is_found_and_its_mending_named(
    judged: Judged, line: str, made: dict[str, int], what: str, verdict: str, change: str
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        row = judged(line, **made)[what]
    assert row.verdict == verdict and change in row.change
    lines = [str(one.message) for one in told if str(one.message).startswith(SAID + what)]
    assert lines == ([f"{SAID}{what}: {row.here}. What to change: {row.change}."] if verdict == "will not do" else [])
    asked, _, _ = row.change.partition(" makes ")
    if asked.startswith("--") and "--model" not in asked:  # an option with its value, which does
        assert judged(f"{line} {asked.partition(':')[0]}", **made)[what].verdict == "fine"


def test_fault_22_more_targets_than_queries_warn(judged: Judged) -> None:
    with pytest.warns(match="objects an image: 5.0, at most 5, for 4 queries. What to change: --num-queries 10"):
        judged("--model detr_lite --num-queries 4", objects=5)


def test_minutes_become_updates_where_the_pace_is_stated(judged: Judged) -> None:
    line = "--model detr_lite --minutes 10"
    open_row = judged(line)[UPDATES]
    assert open_row.verdict == "depends" and "600 take 8.0 images/s" in open_row.here
    assert judged(line, pace=8.0)[UPDATES] == Row(UPDATES, "600 of 8 images")
    slow = judged(line, pace=4.0)[UPDATES]
    assert slow.verdict == "doubtful" and slow.change == "--minutes 20 makes 600"


def test_without_an_object_there_is_nothing_to_judge(judged: Judged) -> None:
    assert judged("--model detr_lite", objects=0) == {}


@pytest.mark.parametrize("model", ["detr_r50", "detr_r50_dc5", "detr_lite", "detr_tiny", "resnet10t"])
def test_the_stride_of_tokens_is_what_the_backbone_has(model: str) -> None:
    config = MODELS.get(model) or ModelConfig(backbone=model)
    backbone = build_backbone(config.backbone, config.dilation, config.map_strides)
    assert backbone(torch.zeros(1, 3, 64, 128)).shape[-1] == 128 / token_stride(config)


def test_widths_are_those_of_the_images_that_are_drawn(judged: Judged) -> None:
    """A whole image of 360 pixels at 180 halves its objects; larger than --max-size none is drawn."""
    rows = judged("--model detr_lite --train-sizes 180 --crop-sizes --max-size 240 --image-size 180", side_px=96)
    assert rows[WIDTH].here.startswith("3.0 tokens of 16 pixels")
    rows = judged("--model detr_lite --train-sizes 180 --crop-sizes --max-size 120 --image-size 90", side_px=96)
    assert rows[WIDTH].here.startswith("1.5 tokens of 16 pixels")
