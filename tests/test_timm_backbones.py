"""A timm backbone computes here what it computes in timm: with its batch norm frozen, and in a model for inference."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from detr_kernels import Selection
from detr_profiling.comparison.closeness import assert_close
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.config import MODELS, UserError
from detr_fast.model.backends import hand_out, selectable
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.model.timm_backbone import TimmBackbone
from detr_fast.runtime import multiplies_bf16
from tests.kernel_inputs import TOLERANCES

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
    torch.manual_seed(0)
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


@pytest.mark.parametrize("name", NAMES)
def test_folded_norms_change_no_feature(name: str) -> None:
    _, model = make_pair(name)
    backbone = model.backbone
    assert isinstance(backbone, TimmBackbone)
    learning = {key for key, each in backbone.named_parameters() if each.requires_grad}
    with torch.no_grad():
        expected = backbone(IMAGES)
        assert backbone.fold_norms()
        torch.testing.assert_close(backbone(IMAGES), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert learning <= {key for key, each in backbone.named_parameters() if each.requires_grad}


class WeightGradients(TorchDispatchMode):
    """Remembers the kernels of depthwise convolutions whose weight gradient oneDNN was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default and args[9] > 1 and args[10][1]:
            self.kernels.append(tuple(args[2].shape[2:]))
        return func(*args, **(kwargs or {}))


def smooth(body: nn.Module) -> None:
    """Replaces activations with kinks, at which another rounding has another gradient."""
    for parent in list(body.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.ReLU | nn.ReLU6 | nn.Hardswish):
                setattr(parent, name, nn.SiLU())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
def test_depthwise_kernels_learn_by_ours_what_they_learn_by_the_librarys(
    name: str, folded: bool, dtype: torch.dtype
) -> None:
    """Wide and strided ones, padded on both sides or, as TensorFlow does, more on one."""
    if dtype == torch.bfloat16 and not multiplies_bf16(torch.device("cpu")):
        pytest.skip("this processor has no bf16 products")
    _, model = make_pair(name)
    backbone = model.float().backbone
    assert isinstance(backbone, TimmBackbone) and (not folded or backbone.fold_norms())
    smooth(backbone)
    learning = [each for each in backbone.parameters() if each.requires_grad]

    def gradients(backend: str, dtype: torch.dtype) -> tuple[list[Tensor], set[tuple[int, ...]]]:
        hand_out(Selection.named(depthwise_convolution=backend), backbone)
        wide = torch.promote_types(dtype, torch.float32)
        with WeightGradients() as seen, torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            y = backbone.to(wide)(IMAGES.to(wide))
            return list(torch.autograd.grad(y.square().mean(), learning)), set(seen.kernels)

    found, narrow = gradients("auto", dtype)
    eager, whole = gradients("ref", dtype)
    exact, _ = gradients("ref", torch.float64)
    assert {(5, 3), (5, 2)} <= narrow and (5, 5) not in narrow and (5, 5) in whole
    for one, oracle, plain in zip(found, exact, eager, strict=True):  # norms: which number errs most is chance
        allowed = 2 * (plain - oracle).norm() + TOLERANCES[dtype] * oracle.norm()
        assert (one - oracle).norm() <= allowed, (name, tuple(one.shape))


def test_detr_lites_backbone_is_one_graph_and_leaves_a_gpu_its_library() -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0", False, (16, 8, 32))
    found = torch._dynamo.explain(backbone)(IMAGES.float())
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    for device, expected in (("cpu", "strips"), ("cuda", "ref")):
        assert {each.backend("depthwise_convolution", torch.device(device)) for each in selectable(backbone)} == {
            expected
        }


def test_what_does_not_fold_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = make_pair("seresnet18")
    backbone = model.backbone
    assert isinstance(backbone, TimmBackbone)
    pairs = backbone._normed_convolutions()
    crossed = [(conv, pairs[index - 1][1]) for index, (conv, _) in enumerate(pairs)]
    crossed = [each for each in crossed if each[0].out_channels == backbone.body.get_submodule(each[1]).weight.numel()]
    monkeypatch.setattr(backbone, "_normed_convolutions", lambda: crossed)
    expected = backbone(IMAGES)
    assert not backbone.fold_norms() and not backbone.folded
    assert torch.equal(backbone(IMAGES), expected)


@pytest.mark.parametrize(("name", "stride"), [("tf_efficientnet_lite0", 16), ("regnety_002", 8), ("test_convnext", 16)])
def test_a_map_of_a_stride_needs_no_later_stage(name: str, stride: int) -> None:
    whole, cut = TimmBackbone(name, False), TimmBackbone(name, False, (stride,))
    own = whole.body.state_dict()
    cut.body.load_state_dict({key: own[key] for key in cut.body.state_dict()})
    number = whole.body.feature_info.reduction().index(stride)
    with torch.no_grad():
        images = IMAGES.float()
        expected = whole.eval().body(images)[number]
        assert torch.equal(cut.eval()(images), expected) and cut.out_channels == expected.shape[1]
    sizes = [sum(each.numel() for each in backbone.parameters()) for backbone in (cut, whole)]
    assert sizes[0] < 0.6 * sizes[1]
    with pytest.raises(UserError, match=f"{name} has no feature map of stride 64"):
        TimmBackbone(name, False, (64,))


def test_what_the_map_of_stride_4_is_made_by_does_not_learn() -> None:
    """DETR freezes its ResNet so; here what is computed decides, whatever it is called."""
    backbone = TimmBackbone("tf_efficientnet_lite0", False)
    learns = {key.split(".")[2]: each.requires_grad for key, each in backbone.named_parameters() if "blocks" in key}
    assert learns == {"0": False, "1": False, "2": True, "3": True, "4": True, "5": True, "6": True}
    assert not backbone.body.conv_stem.weight.requires_grad
