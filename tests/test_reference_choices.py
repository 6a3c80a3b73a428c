"""Everything that is not DETR's, one option at a time and together, against the plain reference in float64: outputs,
losses and all gradients to 1e-9, which leaves no room for another formula."""

import copy
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from detr_profiling.reference.criterion import SigmoidLoss, focal_loss, reference_criterion
from detr_profiling.reference.name_seeded_weights import seeded_batch, seeded_targets
from detr_profiling.reference.queries import Choices, QuerySelection, box_sines
from detr_profiling.reference.weights import reference_of
from torch import Tensor, nn

from detr_fast.config import BEYOND_DETR, MODELS, ModelConfig
from detr_fast.data.batch import Targets
from detr_fast.model.detr import DETR
from detr_fast.model.timm_backbone import TimmBackbone
from detr_fast.training.criterion import LossWeights, Normalizers, build_criterion

CLASSES = 5
TOLERANCE = 1e-9
NO_OBJECT_WEIGHT = 0.125
"""A number that float32 has, too."""
LITE: dict[str, Any] = {"num_queries": 9, "num_classes": CLASSES}
TINY: dict[str, Any] = {**LITE, "encoder_layers": 1, "decoder_layers": 2}
BOXES: dict[str, Any] = {"query_positions": "boxes", "box_refinement": True}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr_lite": ("detr_lite", LITE),
    "a map alone": ("detr_lite", {**LITE, "feature_strides": ()}),
    "norms not folded": ("detr_lite", {**LITE, "fold_norms": False}),
    "nothing but DETR": ("detr_tiny", {**TINY, "source_position": False}),
    "sigmoid alone": ("detr_tiny", {**TINY, "scores": "sigmoid"}),
    "learned queries, boxes refined": ("detr_tiny", {**TINY, **BOXES}),
    "boxes refined, positions learned": ("detr_tiny", {**TINY, "box_refinement": True, "layer_heads": True}),
    "positions of boxes, none refined": ("detr_tiny", {**TINY, "query_positions": "boxes", "scores": "sigmoid"}),
    "proposals, heads shared, none refined": (
        "detr_tiny",
        {**TINY, "queries": "encoder", "query_positions": "boxes", "scores": "sigmoid", "size_divisible": 16},
    ),
    "tokens normed, another temperature": ("detr_tiny", {**TINY, "token_norm": True, "position_temperature": 20.0}),
    "sides padded": ("detr_tiny", {**TINY, "size_divisible": 24}),
    "two maps of a ResNet": ("resnet50", {**TINY, **BOXES, "feature_strides": (32,)}),
    "ResNet's proposals": (
        "resnet18",
        {**TINY, **BOXES, "queries": "encoder", "scores": "sigmoid", "size_divisible": 16},
    ),
}


def make(name: str) -> DETR:
    """A model whose every parameter shows: neither zeros in its box heads nor a norm that is the identity."""
    preset, changes = CONFIGS[name]
    if preset not in MODELS:
        changes = {**changes, "backbone": preset, "token_stride": 16}
    config = replace(MODELS.get(preset, MODELS["detr_tiny"]), **changes)
    torch.manual_seed(0)
    model = DETR(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for key, buffer in model.named_buffers():
            buffer.copy_(torch.rand_like(buffer) + 0.5 if "running" in key or "weight" in key else buffer)
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Compute them of what learns, under the names that both sides have without their wrappers."""
    model.zero_grad()
    loss.backward()
    found = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    return {key.replace(".0.body.", ".").replace(".body.", "."): grad for key, grad in found.items()}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "class_loss"), [*product(CONFIGS, ["focal"]), ("detr_lite", "varifocal")])
def test_outputs_losses_and_gradients_are_the_references(
    name: str, class_loss: SigmoidLoss, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_profiling.reference.criterion.NO_OBJECT_WEIGHT", NO_OBJECT_WEIGHT)
    model = make(name)
    reference, model = reference_of(model).double(), model.double()
    sizes = [(90, 118), (80, 64)] if padded else [(90, 118)] * 2
    images, mask = seeded_batch(sizes, salt=1)
    targets = [each | {"boxes": each["boxes"].double()} for each in seeded_targets([3, 5], CLASSES, salt=1)]
    scores = model.config.scores
    found = model.predict_layers(images.double(), mask if padded else None)
    expected = reference(images.double(), mask)
    assert_same_outputs(found.to_dict(), expected)
    criterion = build_criterion(CLASSES, LossWeights(no_object=NO_OBJECT_WEIGHT), scores=scores, class_loss=class_loss)
    terms = criterion(found, *in_double(targets, found.logits.shape[2]))
    exact = reference_criterion(expected, targets, scores, class_loss)
    assert {each for each in terms if each.startswith("loss")} == exact.keys()
    for term, value in exact.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=TOLERANCE, abs=TOLERANCE), term
    ours, theirs = gradients(model, terms["loss"]), gradients(reference, exact["loss"])
    assert ours.keys() == theirs.keys()
    total = sum(grad.square().sum() for grad in theirs.values()) ** 0.5
    for key, grad in theirs.items():
        assert (ours[key] - grad).norm() <= TOLERANCE * (grad.norm() + total), key


def in_double(targets: list[dict[str, Tensor]], queries: int) -> tuple[Targets, Normalizers]:
    """Targets, and what divides their losses, which training has in float32."""
    made = Targets.from_list(targets)
    boxes = made.count.sum().double()  # fewer than queries
    unmatched = len(targets) * queries - boxes
    return replace(made, boxes_cxcywh=made.boxes_cxcywh.double()), Normalizers(
        boxes, boxes + unmatched * NO_OBJECT_WEIGHT
    )


def assert_same_outputs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    layers = zip([found, *found["aux_outputs"]], [expected, *expected["aux_outputs"]], strict=True)
    for ours, theirs in [
        *layers,
        *([(found["enc_outputs"], expected["enc_outputs"])] if "enc_outputs" in found else []),
    ]:
        for key in ("pred_logits", "pred_boxes"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=TOLERANCE)


def test_folding_is_the_frozen_norm() -> None:
    """The reference keeps convolution and norm; ours, of the same weights, has them in one. Its weight's gradient is
    that of the product: the reference's divided by the norm's scale."""
    model = make("norms not folded")
    reference, folded = reference_of(model).double(), copy.deepcopy(model).double()
    assert isinstance(folded.backbone, TimmBackbone) and folded.backbone.fold_norms()
    images, mask = seeded_batch([(96, 128), (80, 64)], salt=1)
    found, expected = folded(images.double(), mask), reference(images.double(), mask)
    assert_same_outputs(found, expected)
    ours, theirs = (gradients(*each) for each in ((folded, loss(found)), (reference, loss(expected))))
    norm: Any = reference.get_submodule("backbone.0.body.blocks.2.0.bn1")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    key = "backbone.blocks.2.0.conv_pw.weight"
    torch.testing.assert_close(ours[key] * scale[:, None, None, None], theirs[key], rtol=TOLERANCE, atol=TOLERANCE)
    own = {each for each in ours.keys() - theirs.keys() if each.startswith("backbone")}
    assert own and all(each.endswith("bias") for each in own)


def loss(outputs: dict[str, Any]) -> Tensor:
    return outputs["pred_logits"].square().sum() + outputs["pred_boxes"].square().sum()


def test_the_reference_has_every_option() -> None:
    assert {each.name for each in fields(Choices)} == set(BEYOND_DETR)
    usual = ModelConfig()
    assert Choices() == Choices(**{name: getattr(usual, name) for name in BEYOND_DETR})


def test_box_sines_are_those_of_hugging_face() -> None:
    """Its DAB-DETR's: of each image's queries, in float64 all the way."""
    modeling = pytest.importorskip("transformers.models.dab_detr.modeling_dab_detr")
    boxes = torch.rand(2, 5, 4, dtype=torch.float64)
    theirs = modeling.encode_sinusoidal_position_embedding(boxes, 32, 20)
    torch.testing.assert_close(box_sines(boxes, 64, 20.0), theirs, rtol=0, atol=1e-6)


def test_the_focal_loss_is_torchvisions() -> None:
    from torchvision.ops import sigmoid_focal_loss

    logits = torch.randn(3, 7, 5, dtype=torch.float64) * 5
    wanted = (torch.rand(3, 7, 5) < 0.2).double()
    torch.testing.assert_close(focal_loss(logits, wanted), sigmoid_focal_loss(logits, wanted, alpha=0.25, gamma=2))


@pytest.mark.parametrize("fault", ["order", "padding", "boxes"])
def test_a_planted_fault_in_the_selection_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing blurs what comes of the tokens: one that is chosen wrongly is far from 1e-9."""
    plain = QuerySelection.forward

    def planted(self: QuerySelection, memory: Tensor, anchors: Tensor, padded: Tensor) -> Any:
        found = plain(self, memory, anchors, torch.zeros_like(padded) if fault == "padding" else padded)
        if fault == "order":
            return found._replace(state=found.state.flip(0))
        if fault == "boxes" and found.boxes_cxcywh is not None:
            return found._replace(boxes_cxcywh=found.boxes_cxcywh.flip(1))
        return found

    monkeypatch.setattr(QuerySelection, "forward", planted)
    with pytest.raises(AssertionError):
        test_outputs_losses_and_gradients_are_the_references("detr_lite", "focal", True, monkeypatch)
