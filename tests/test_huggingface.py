"""Inference against transformers' DETR, code that no one here wrote, built without download on the same weights.

`auxiliary_loss=False`: with True it feeds the normed state on, which is another model (docs/specification.md).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.reference.name_seeded_weights import perturbed_state_dict, seeded_batch
from torch import nn

from detr_fast import DETR, Detector, build_model, export_state_dict, load_model, load_state_dict
from detr_fast.export import ExportConfig, main, write_weights

transformers = pytest.importorskip("transformers", reason="pip install 'detr-fast[reference]'")

SIZES = [(96, 128), (80, 64)]


def build_baseline(backbone: str, dilation: bool = False) -> Any:
    common = {"num_labels": 91, "auxiliary_loss": False}
    if backbone == "native":
        resnet = transformers.ResNetConfig(out_features=["stage4"])
        config = transformers.DetrConfig(use_timm_backbone=False, backbone_config=resnet, **common)
    else:
        config = transformers.DetrConfig(use_pretrained_backbone=False, backbone=backbone, dilation=dilation, **common)
    return transformers.DetrForObjectDetection(config).eval()


def build_ours(name: str) -> DETR:
    """Its norms and biases are not 1 and 0, as they are at initialisation, where several mistakes would not show."""
    model = build_model(name)
    load_state_dict(model, perturbed_state_dict(export_state_dict(model, "facebook"), salt=7))
    return model.eval()


def assert_same_predictions(model: DETR, baseline: nn.Module) -> None:
    images, mask = seeded_batch(SIZES, salt=2)
    with torch.inference_mode():
        ours, theirs = model(images, mask), baseline(images, (~mask).long())
    torch.testing.assert_close(ours["pred_logits"], theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours["pred_boxes"], theirs.pred_boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "dilation"), [("detr_r50", False), ("detr_r50_dc5", True)])
def test_our_weights_in_their_model(name: str, dilation: bool) -> None:
    model, baseline = build_ours(name), build_baseline("resnet50", dilation)
    exported = export_state_dict(model, "huggingface")
    assert len(exported) == 530
    baseline.load_state_dict(exported, strict=True)
    assert_same_predictions(model, baseline)


@pytest.mark.parametrize("backbone", ["resnet50", "native"])
def test_their_weights_in_our_model(backbone: str) -> None:
    baseline = build_baseline(backbone)
    baseline.load_state_dict(perturbed_state_dict(baseline.state_dict(), salt=9))
    model = build_model("detr_r50").eval()
    load_state_dict(model, baseline.state_dict())
    assert_same_predictions(model, baseline)


def test_their_folder_is_read(tmp_path: Path) -> None:
    baseline = build_baseline("resnet50", dilation=True)
    baseline.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.dilation and model.config.backbone == "resnet50"
    assert_same_predictions(model, baseline)


def test_our_folder_is_read_by_them(tmp_path: Path) -> None:
    model = build_ours("detr_r50_dc5")
    write_weights(Detector(model), tmp_path / "own.pth", "detr_fast")
    folder = tmp_path / "exported"
    assert main(ExportConfig(weights=str(tmp_path / "own.pth"), out=str(folder), naming="huggingface")) == 0
    assert_same_predictions(model, transformers.DetrForObjectDetection.from_pretrained(folder).eval())
