"""Weights in and out: the three namings, unsafe and damaged files, architectures that disagree, the class head."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.reference.name_seeded_weights import name_seeded_state_dict
from safetensors.torch import save_file
from torch import Tensor

from detr_fast import DETR, Detector, build_model, export_state_dict, load_model, load_state_dict
from detr_fast.config import UserError, model_config
from detr_fast.data.annotations import Category
from detr_fast.export import ExportOptions, main, write_weights
from detr_fast.weights import load_for_fine_tuning, read_state_dict
from detr_fast.weights.class_head import coco_categories, fit_class_head
from detr_fast.weights.container import write_container
from detr_fast.weights.naming import Naming, naming_of

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 64, "num_queries": 7}
PETS = (Category(3, "Dog"), Category(8, "parrot"), Category(9, "CAT"))


@pytest.fixture(scope="module")
def model() -> DETR:
    """A ResNet-50 detector with a short transformer and weights that differ everywhere."""
    model = build_model("detr_r50", **SMALL)
    load_state_dict(model, name_seeded_state_dict(export_state_dict(model, "facebook"), salt=1))
    return model.eval()


@pytest.fixture(scope="module")
def upstream_file(model: DETR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As facebookresearch's training writes it: weights, optimizer and an argparse.Namespace."""
    path = tmp_path_factory.mktemp("upstream") / "checkpoint.pth"
    args = argparse.Namespace(dilation=True, nheads=8, dropout=0.25, dataset_file="coco", lr=1e-4)
    torch.save(
        {"model": export_state_dict(model, "facebook"), "optimizer": {"state": {}}, "epoch": 3, "args": args}, path
    )
    return path


def assert_same_weights(model: DETR | Detector, other: DETR | Detector) -> None:
    networks = (each.network if isinstance(each, Detector) else each for each in (model, other))
    expected, found = (network.state_dict() for network in networks)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "naming", "entries", "parameters"),
    [
        ("detr_r50", "facebook", 458, 41_524_768),
        ("detr_r50", "detr_fast", 458, 41_524_768),
        ("detr_r50", "huggingface", 530, 41_524_768),
        ("detr_r101", "facebook", 713, 60_464_672),
    ],
)
def test_entries_and_parameters(name: str, naming: Naming, entries: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert len(export_state_dict(model, naming)) == entries
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_trained_parameters() -> None:
    with torch.device("meta"):
        model = build_model("detr_r50")
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 41_302_368


@pytest.mark.parametrize("naming", ["detr_fast", "facebook", "huggingface"])
def test_round_trip_is_bit_equal(model: DETR, naming: Naming) -> None:
    exported = export_state_dict(model, naming)
    assert naming_of(exported) == naming
    other = build_model("detr_r50", **SMALL)
    load_state_dict(other, exported)
    assert_same_weights(model, other)


@pytest.mark.parametrize("naming", ["facebook", "huggingface"])
def test_timm_backbone_round_trip(naming: Naming) -> None:
    model, other = (build_model("resnet18", **SMALL) for _ in range(2))
    exported = export_state_dict(model, naming)
    assert not any(".body.body." in key for key in exported)
    load_state_dict(other, exported)
    assert_same_weights(model, other)


def test_timm_backbone_that_looks_like_a_resnet(tmp_path: Path) -> None:
    model, file, folder = build_model("resnet50d", **SMALL), tmp_path / "weights.safetensors", tmp_path / "folder"
    write_weights(Detector(model), file, "huggingface")
    main(ExportOptions(weights=str(file), output=str(folder), naming="huggingface"))
    for path in (file, folder):
        loaded = load_model(path)
        assert loaded.config.backbone == "resnet50d"
        assert_same_weights(model, loaded)


def test_older_names_on_the_hub(model: DETR) -> None:
    def older(key: str) -> str:
        key = key.replace("model.backbone.", "model.backbone.conv_encoder.").replace(".o_proj.", ".out_proj.")
        return key.replace(".mlp.fc", ".fc")

    exported = {older(key): value for key, value in export_state_dict(model, "huggingface").items()}
    assert "model.decoder.layers.1.encoder_attn.out_proj.bias" in exported
    other = build_model("detr_r50", **SMALL)
    load_state_dict(other, exported)
    assert_same_weights(model, other)


@pytest.mark.parametrize("naming", ["facebook", "huggingface"])
def test_tiny_has_no_counterpart(naming: Naming) -> None:
    with pytest.raises(UserError, match="no counterpart"):
        export_state_dict(build_model("detr_tiny"), naming)


def test_upstream_file_says_what_shapes_do_not(model: DETR, upstream_file: Path) -> None:
    loaded = load_model(upstream_file)
    assert_same_weights(model, loaded)
    assert loaded.config == model_config("detr_r50_dc5", **SMALL, dropout=0.25)
    assert not loaded.network.training
    assert loaded.categories is not None and len(loaded.categories) == 91
    assert loaded.categories[18] == Category(18, "dog") and loaded.categories[90].name == "toothbrush"


def test_dc5_from_the_name_or_the_argument(model: DETR, tmp_path: Path) -> None:
    plain, dc5 = tmp_path / "detr-r50-e632da11.pth", tmp_path / "detr-r50-dc5-f0fb7ef5.pth"
    for path in (plain, dc5):
        torch.save({"model": export_state_dict(model, "facebook")}, path)
    assert load_model(dc5).config.dilation
    assert not load_model(plain).config.dilation
    assert load_model(plain, dilation=True).config.dilation


def test_file_in_torchs_older_format(model: DETR, tmp_path: Path) -> None:
    """Released files are of that kind; it cannot be mapped into memory."""
    path = tmp_path / "old.pth"
    torch.save({"model": export_state_dict(model, "facebook")}, path, _use_new_zipfile_serialization=False)
    assert_same_weights(model, load_model(path))


def test_own_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ema = build_model("detr_tiny", num_classes=3), build_model("detr_tiny", num_classes=3)
    state = {
        "model": model.state_dict(),
        "model_config": model.config.to_dict(),
        "categories": [{"id": category.id, "name": category.name} for category in PETS],
    }
    path = tmp_path / "last.pt"
    write_container(path, state)
    loaded = load_model(path)
    assert_same_weights(loaded, model)
    assert loaded.config == model.config and loaded.categories == PETS

    write_container(path, {**state, "ema": ema.state_dict()})
    assert_same_weights(load_model(path), ema)

    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        load_model(path)


def test_truncated_file_is_named(upstream_file: Path, tmp_path: Path) -> None:
    content = upstream_file.read_bytes()
    for share in (0.1, 0.5, 0.999):
        (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"cut\.pth"):
            load_model(tmp_path / "cut.pth")


def test_shards_stay_in_their_folder(model: DETR, tmp_path: Path) -> None:
    tensors = {key: value.clone() for key, value in export_state_dict(model, "huggingface").items()}
    names = sorted(tensors)
    files = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_weights(model, load_model(tmp_path))

    index["weight_map"][names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="same folder"):
        load_model(tmp_path)


def test_a_configuration_without_bounds_is_refused(model: DETR, tmp_path: Path) -> None:
    """docs/faults.md, row 36. A sparse file: nothing of that size is written or read."""
    save_file(export_state_dict(model, "huggingface"), tmp_path / "model.safetensors")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"config\.json.*no configuration"):
        load_model(tmp_path)


def test_config_that_computes_something_else_is_refused(model: DETR, tmp_path: Path) -> None:
    write_weights(Detector(model), tmp_path / "model.safetensors", "huggingface")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr", "auxiliary_loss": True}))
    with pytest.raises(UserError, match="auxiliary_loss=True"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr", "decoder_attention_heads": 4}))
    with pytest.raises(UserError, match="only the same number"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"backbone": "resnet101"}, "--model detr_r101 "),
        ({"num_classes": 3}, "--num-classes 3 "),
        ({"num_queries": 50}, "--num-queries 50 "),
    ],
)
def test_mismatch_names_keys_and_the_option(model: DETR, change: dict[str, Any], option: str) -> None:
    with torch.device("meta"):
        source = build_model("detr_r50", **{**SMALL, **change})
    exported = {key: torch.empty(value.shape) for key, value in export_state_dict(source, "facebook").items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as raised:
        load_state_dict(model, exported)
    assert option in str(raised.value)
    assert "unexpected: backbone.0.body.layer3.6" in str(raised.value) or "instead of" in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_keys_are_named(model: DETR) -> None:
    exported = export_state_dict(model, "huggingface")
    del exported["model.decoder.layers.1.encoder_attn.k_proj.bias"]
    with pytest.raises(UserError, match=r"missing: transformer\.decoder\.layers\.1\.multihead_attn\.in_proj_bias"):
        load_state_dict(model, exported)


@pytest.mark.parametrize("naming", ["detr_fast", "facebook", "huggingface"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_command(naming: Naming, suffix: str, upstream_file: Path, model: DETR, tmp_path: Path) -> None:
    out = tmp_path / f"exported{suffix}"
    assert main(ExportOptions(weights=str(upstream_file), output=str(out), naming=naming)) == 0
    assert naming_of(read_state_dict(out)) == naming
    loaded = load_model(out)
    assert_same_weights(model, loaded)
    assert loaded.config == load_model(upstream_file).config  # DC5 too, which no shape shows
    assert loaded.categories == coco_categories()
    assert not list(tmp_path.glob("*.partial"))


def test_export_refuses_other_suffixes() -> None:
    with pytest.raises(UserError, match="--output"):
        ExportOptions(weights="a.pth", output="b.onnx")


def head(state_dict: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return state_dict["class_embed.weight"], state_dict["class_embed.bias"]


def test_fine_tuning_keeps_the_classes_that_agree(upstream_file: Path, model: DETR) -> None:
    own = build_model("detr_r50", num_classes=3, **SMALL)
    fresh = head({key: value.clone() for key, value in own.state_dict().items()})
    assert load_for_fine_tuning(own, upstream_file, PETS).classes == ["Dog", "CAT"]
    coco = {category.name: category.id for category in coco_categories()}
    for kept, new, source in zip(head(own.state_dict()), fresh, head(model.state_dict()), strict=True):
        assert torch.equal(kept[0], source[coco["dog"]]) and torch.equal(kept[2], source[coco["cat"]])
        assert torch.equal(kept[1], new[1])
        assert torch.equal(kept[3], source[91])  # "no object"
    assert torch.equal(own.query_embed.weight, model.query_embed.weight)


def test_fine_tuning_on_the_same_classes_is_plain_loading(upstream_file: Path, model: DETR) -> None:
    own = build_model("detr_r50", **SMALL)
    for categories in (None, coco_categories()):
        load_for_fine_tuning(own, upstream_file, categories)
        assert_same_weights(own, model)


def test_fine_tuning_with_unknown_names_keeps_no_object_alone(model: DETR) -> None:
    own = build_model("detr_r50", num_classes=3, **SMALL)
    fitted, kept = fit_class_head(own, export_state_dict(model, "facebook"), None, PETS)
    assert kept == []
    assert torch.equal(fitted["class_embed.weight"][:3], own.class_embed.weight[:3])
    assert torch.equal(fitted["class_embed.weight"][3], model.class_embed.weight[91])


def test_fine_tuning_with_another_backbone_is_refused(upstream_file: Path) -> None:
    deeper = build_model("detr_r101", num_classes=3, **SMALL)
    with pytest.raises(UserError, match="--model detr_r50"):
        load_for_fine_tuning(deeper, upstream_file)


def test_fine_tuning_does_not_cut_a_deeper_backbone(tmp_path: Path) -> None:
    """Every name of ResNet-50 is in ResNet-101 as well."""
    torch.save({"model": export_state_dict(build_model("detr_r101", **SMALL), "facebook")}, tmp_path / "deep.pth")
    own = build_model("detr_r50", num_classes=3, **SMALL)
    with pytest.raises(UserError, match="--model detr_r101"):
        load_for_fine_tuning(own, tmp_path / "deep.pth", PETS)
