"""Hugging Face's preprocessor_config.json: written with a folder, and followed where it is read, or refused by key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import DETR, build_model, load_model
from detr_fast.config import UserError
from detr_fast.data.annotations import Category
from detr_fast.export import ExportConfig, main, write_weights
from detr_fast.weights import load_for_fine_tuning

PETS = (Category(3, "Dog"), Category(8, "parrot"), Category(9, "CAT"))
SMALL: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 64, "num_queries": 8}
INPUT: dict[str, Any] = {
    "image_size": 96,
    "max_size": 140,
    "image_mean": (0.4, 1 / 3, 0.1),
    "image_std": (0.3, 0.2, 0.7 / 3),
}


def exported(model: DETR, folder: Path) -> Path:
    """The folder that export writes for `model`."""
    write_weights(model, folder / "own.safetensors", "detr_fast")
    out = folder / "exported"
    assert main(ExportConfig(weights=str(folder / "own.safetensors"), out=str(out), naming="huggingface")) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_fast.model.backbone.STAGE_WIDTHS", (2, 4, 8, 16))  # small files
        model = build_model("detr_r50", num_classes=3, hidden_dim=32, **SMALL, **INPUT)
        model.categories = PETS
        yield exported(model, tmp_path_factory.mktemp("preprocessing"))


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """The exported folder, to be changed."""
    before = {file: file.read_text() for file in made.glob("*.json")}
    yield made
    for file, text in before.items():
        file.write_text(text)


def said(folder: Path, **values: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def test_a_folder_keeps_what_the_model_expects(folder: Path) -> None:
    written = load_model(folder.parent / "own.safetensors")
    for path in (folder, folder / "model.safetensors"):
        loaded = load_model(path)
        assert loaded.config == written.config and loaded.config.image_std == INPUT["image_std"]
        assert loaded.categories == PETS  # ids too, which Hugging Face's files do not have


def test_names_that_were_changed_in_the_folder_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "hound", "2": "cat"}}  # and a gap
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).categories == (Category(0, "hound"), Category(1, "N/A"), Category(2, "cat"))


DEFAULT = (800, 1333, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("values", "sizes", "statistics"),
    [
        ({"size": {"shortest_edge": 64, "longest_edge": 96}}, (64, 96), None),
        ({"size": {"shortest_edge": 96, "longest_edge": 64}}, (64, 64), None),
        ({"size": 600, "max_size": 900}, (600, 900), None),
        ({"size": 600, "feature_extractor_type": "DetrFeatureExtractor"}, (600, 1333), None),
        ({"image_mean": [0.5] * 3, "image_std": 0.5, "format": "coco_panoptic"}, None, ((0.5,) * 3, (0.5,) * 3)),
        ({"image_mean": None, "size": None, "do_pad": True}, None, None),
        ({"do_normalize": False, "image_std": [0.5] * 3}, None, ((0.0,) * 3, (1.0,) * 3)),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, None, ((0.5,) * 3, (0.2,) * 3)),
        ({"rescale_factor": 2 / 255, "image_mean": [1] * 3, "image_std": [2] * 3}, None, ((0.5,) * 3, (1.0,) * 3)),
        ({"rescale_factor": 0.003921568859368563, "resample": 2}, None, None),  # 1/255 in float32
    ],
)
def test_what_can_be_followed_is(values: dict[str, Any], sizes: Any, statistics: Any, folder: Path) -> None:
    for path in (said(folder, **values), folder / "model.safetensors"):
        config = load_model(path).config
        assert (config.image_size, config.max_size) == (sizes or DEFAULT[:2])
        for found, wanted in zip((config.image_mean, config.image_std), statistics or DEFAULT[2:], strict=True):
            assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"height": 640, "width": 640}),
        ("size", {"shortest_edge": 640}),
        ("size", {"shortest_edge": 0, "longest_edge": 9}),
        ("size", "large"),
        ("size", True),
        ("do_resize", False),
        ("do_center_crop", True),
        ("resample", 3),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, float("nan"), 0.5]),
        ("image_std", [0.5, 0, 0.5]),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_key(key: str, value: Any, folder: Path) -> None:
    with pytest.raises(UserError, match=rf"preprocessor_config\.json has {key}=.*: change it there\.$"):
        load_model(said(folder, **{key: value}))


def test_fine_tuning_says_that_images_were_normalised_otherwise(folder: Path) -> None:
    own = build_model("detr_r50", num_classes=2, hidden_dim=32, **SMALL)
    assert "normalised with mean (0.5, 0.5, 0.5)" in load_for_fine_tuning(own, said(folder, image_mean=0.5)).notes[-1]
    assert not any("normalised" in note for note in load_for_fine_tuning(own, said(folder, size=600)).notes)


def test_a_pipeline_of_transformers_finds_what_predict_does(tmp_path: Path) -> None:
    """On a photograph that both resize; boxes of a pipeline are whole pixels."""
    transformers = pytest.importorskip("transformers", reason="pip install 'detr-fast[reference]'")
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, **SMALL, **INPUT)
    torch.nn.init.normal_(model.class_embed.weight, std=0.5)
    torch.nn.init.normal_(model.query_embed.weight, std=3)
    model.categories = PETS
    folder = exported(model, tmp_path)
    rough = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((170, 120), Image.Resampling.BILINEAR).save(tmp_path / "photo.png")
    pipeline = transformers.pipeline("object-detection", model=str(folder), threshold=0.0)
    theirs = sorted(pipeline(str(tmp_path / "photo.png")), key=lambda found: -found["score"])
    (ours,) = load_model(folder).predict(str(tmp_path / "photo.png"), threshold=0.0)
    assert ours.names == [found["label"] for found in theirs] and len(ours) == 8
    assert ours.scores.tolist() == pytest.approx([found["score"] for found in theirs], abs=1e-3)
    boxes = torch.tensor([[found["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for found in theirs])
    assert (ours.boxes_xyxy_px - boxes).abs().max() < 1.1
