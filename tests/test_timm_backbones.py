"""A timm backbone computes here what it computes in timm: with its batch norm frozen, and in a model for inference."""

from dataclasses import replace

import pytest
import torch
from detr_profiling.comparison.closeness import assert_close
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detr_fast.config import MODELS
from detr_fast.model.backbone import TimmBackbone
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.runtime import multiplies_bf16

timm = pytest.importorskip("timm", reason="timm is an extra")

NAMES = {
    "tf_efficientnet_lite0": "ReLU6 within its batch norm",
    "mobilenetv3_small_050": "hard swish within its batch norm, squeeze and excitation",
    "regnety_002": "convolution, norm and activation as one module",
    "seresnet18": "a ResNet with squeeze and excitation",
    "resnetblur18": "a ResNet that blurs before it strides",
    "dla46_c": "batch norm, then an activation of its own",
    "densenet121": "batch norm and activation before the convolution",
    "ghostnet_050": "features of two convolutions",
    "hrnet_w18_small": "branches of several sizes",
    "test_byobnet": "several kinds of blocks",
    "test_efficientnet_gn": "group norm with its activation",
    "edgenext_xx_small": "layer norm and attention over channels",
    "test_convnext": "layer norm over channels",
}
"""Small ones of different kinds, and what is particular about each."""
ALIKE_IN_TRAINING = ("tf_efficientnet_lite0", "regnety_002", "densenet121", "hrnet_w18_small")
"""Those in which nothing but batch norm could differ between training and evaluation."""
IMAGES = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def randomize(body: nn.Module) -> None:
    """Gives all norms statistics and terms that are not the identity."""
    torch.manual_seed(0)
    for module in body.modules():
        if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm):
            module.weight.data.uniform_(0.6, 1.4)
            module.bias.data.normal_(0, 0.3)
        if isinstance(module, _BatchNorm):
            module.running_var.uniform_(0.6, 1.4)  # type: ignore[union-attr]
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]


def make_pair(name: str) -> tuple[nn.Module, DETR]:
    """The model as timm makes it, in evaluation mode, and a small DETR around the same weights; float64."""
    body = timm.create_model(name, pretrained=False, features_only=True).eval()
    randomize(body)
    config = replace(MODELS["detr_tiny"], backbone=name, encoder_layers=1, decoder_layers=1, hidden_dim=32)
    model = DETR(config).eval()
    backbone = model.backbone
    assert isinstance(backbone, TimmBackbone)
    loaded = backbone.body.load_state_dict(body.state_dict(), strict=False)
    assert not loaded.missing_keys and all(key.endswith("num_batches_tracked") for key in loaded.unexpected_keys)
    return body.double(), model.double()


def outputs(model: DETR, dtype: torch.dtype) -> dict[str, Tensor]:
    images = IMAGES.to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        found = model(images, None)
    return {name: found[name] for name in ("pred_logits", "pred_boxes")}


@pytest.mark.parametrize("name", NAMES)
def test_freezing_its_norms_changes_no_feature(name: str) -> None:
    body, model = make_pair(name)
    with torch.no_grad():
        expected = body(IMAGES)[-1]
        for training in (True, False) if name in ALIKE_IN_TRAINING else (False,):
            found = model.train(training).backbone(IMAGES)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert not any(isinstance(module, _BatchNorm) for module in model.modules()), "statistics that training would move"
    before = outputs(model, torch.float64)
    for key, value in outputs(optimized(model, torch.float64), torch.float64).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)  # outputs are float32


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "test_efficientnet_gn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_for_inference_is_as_exact_as_eager_code(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    _, model = make_pair(name)
    exact = outputs(model, torch.float64)
    eager, found = outputs(model.float(), dtype), outputs(optimized(model, dtype), dtype)
    for key, value in exact.items():
        assert_close(found[key], value, eager[key], 1e-5 * value.abs().max().item(), key)
