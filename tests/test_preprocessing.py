"""Hugging Face's preprocessor_config.json: written with a folder, and followed where it is read, or refused by key."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from detr_fast import DETR, Detector, build_model, load_model
from detr_fast.config import UserError
from detr_fast.data.annotations import Category
from detr_fast.export import ExportOptions, main, write_weights
from detr_fast.weights import load_for_fine_tuning

PETS = (Category(3, "Dog"), Category(8, "parrot"), Category(9, "CAT"))
SMALL: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 64, "num_queries": 8}
INPUT: dict[str, Any] = {
    "image_size": 96,
    "max_size": 140,
    "image_mean": (0.4, 1 / 3, 0.1),
    "image_std": (0.3, 0.2, 0.7 / 3),
}


def exported(model: DETR, folder: Path, categories: tuple[Category, ...] | None = PETS) -> Path:
    """The folder that export writes for `model`."""
    write_weights(Detector(model, categories), folder / "own.safetensors", "detr_fast")
    out = folder / "exported"
    assert main(ExportOptions(weights=str(folder / "own.safetensors"), output=str(out), naming="huggingface")) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_fast.model.backbone.STAGE_WIDTHS", (2, 4, 8, 16))  # small files
        model = build_model("detr_r50", num_classes=3, hidden_dim=32, **SMALL, **INPUT)
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


def configured(folder: Path, **values: Any) -> Path:
    """The folder with `values` changed in its config.json."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_names_that_were_changed_in_the_folder_count(folder: Path) -> None:
    configured(folder, id2label={"0": "hound", "2": "cat"})  # and a gap
    for path in (folder, folder / "model.safetensors"):
        assert load_model(path).categories == (Category(0, "hound"), Category(1, "N/A"), Category(2, "cat"))


@pytest.fixture
def single_files(folder: Path, tmp_path: Path) -> list[Path]:
    """The folder's weights as transformers writes them, without what we add, in each kind of file."""
    tensors = load_file(folder / "model.safetensors")
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return [tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"]


def test_a_file_of_a_folder_is_read_as_the_folder(single_files: list[Path], folder: Path) -> None:
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    there = configured(said(single_files[0].parent, size=480, max_size=640), **heads, dilation=True)
    whole = load_model(there)
    assert (whole.config.num_heads, whole.config.dilation, whole.config.image_size) == (4, True, 480)
    for file in single_files:
        alone = load_model(file)
        assert alone.config == whole.config and alone.categories == whole.categories


def test_what_lies_beside_another_detr_is_not_its(single_files: list[Path], folder: Path) -> None:
    """Neither a Hugging Face folder nor the config.json of a run says anything of facebookresearch's file."""
    there = configured(single_files[0].parent, encoder_attention_heads=4)
    write_weights(load_model(folder), there / "facebook.pth", "facebook")
    tensors = torch.load(there / "facebook.pth", weights_only=True)["model"]
    torch.save({"model": tensors}, there / "facebook.pth")
    assert load_model(there / "facebook.pth").config.num_heads == 8
    (there / "config.json").write_text('{"epochs": 3}')
    assert load_model(single_files[1]).config.num_heads == 8


@pytest.mark.parametrize("kind", ["conditional_detr", "table-transformer", "bart", 5])
def test_another_model_is_named_by_its_config(kind: Any, single_files: list[Path]) -> None:
    """Whether its names are DETR's, as Table Transformer's, or not at all."""
    there = configured(single_files[0].parent, model_type=kind)
    if kind == "bart":
        save_file({"model.shared.weight": torch.zeros(2, 2)}, single_files[0])
    for path in (there, single_files[0]):
        for use in (load_model, partial(load_for_fine_tuning, build_model("detr_tiny"))):
            with pytest.raises(UserError, match=f"is a model of type {kind}, not a DETR"):
                use(path)


def test_a_translator_is_no_detr(tmp_path: Path) -> None:
    torch.save({"model.decoder.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}, tmp_path / "bart.bin")
    for use in (load_model, partial(load_for_fine_tuning, build_model("detr_tiny"))):
        with pytest.raises(UserError, match="does not look like a DETR"):
            use(tmp_path / "bart.bin")


def test_classes_without_names_are_the_same_from_folder_and_file(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_fast.model.backbone.STAGE_WIDTHS", (2, 4, 8, 16))
        out = exported(build_model("detr_r50", hidden_dim=32, **SMALL), tmp_path, None)
        assert load_model(out).categories == load_model(out / "model.safetensors").categories


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
        ("size", {"shortest_edge": 10**400, "longest_edge": 10**400}),
        ("size", "large"),
        ("size", True),
        ("do_resize", False),
        ("do_center_crop", True),
        ("resample", 3),
        ("image_mean", [0.5]),
        ("image_mean", [0.5, float("nan"), 0.5]),
        ("image_mean", [10**400] * 3),
        ("image_std", [0.5, 0, 0.5]),
        ("image_std", [0.5, 1e-320, 0.5]),
        ("rescale_factor", 0),
        ("rescale_factor", 1e-320),
        ("rescale_factor", 10**400),
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
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=3, **SMALL, **INPUT)
    torch.nn.init.normal_(model.class_embed.weight, std=0.5)
    torch.nn.init.normal_(model.query_embed.weight, std=3)
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
