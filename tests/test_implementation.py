"""The switch: every form of the operations is the same model, each choice has a reason, and mistakes are named."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_fast.config import MODELS, Attention, Kernels, RuntimeOptions, UserError
from detr_fast.data.targets import Targets
from detr_fast.detector import place
from detr_fast.model import backbone
from detr_fast.model.detr import DETR
from detr_fast.runtime import choose_runtime, select_implementation
from detr_fast.training.criterion import build_criterion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = replace(MODELS["detr_r50"], encoder_layers=2, decoder_layers=2, num_queries=9, num_classes=5, dropout=0.0)
FORMS: list[tuple[Kernels, Attention]] = [("auto", "auto"), ("triton", "auto"), ("triton", "sdpa"), ("ref", "triton")]


@pytest.fixture(autouse=True)
def narrow_backbone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ResNet with one narrow block a stage, which the interpreter runs in seconds; TF32 would hide a mistake."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    monkeypatch.setattr(backbone, "STAGE_WIDTHS", (8, 16, 16, 32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield


def make_model(dilation: bool = False) -> DETR:
    torch.manual_seed(0)
    model = DETR(replace(CONFIG, dilation=dilation)).train()
    for module in model.modules():  # as constants the norms would hide a mistake
        if isinstance(module, backbone.FrozenBatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.to(DEVICE)


def run(model: DETR, kernels: Kernels, attention: Attention, padded: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs and terms, and gradients, of three images: a whole one, one padded right and below, one all padding."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 64, 96, generator=generator).to(DEVICE)
    mask = torch.zeros(3, 64, 96, dtype=torch.bool, device=DEVICE)
    mask[1, 40:], mask[1, :, 50:], mask[2] = True, True, True
    boxes = torch.rand(3, 4, 4, generator=generator) * 0.5 + 0.2
    targets = Targets(torch.randint(0, 5, (3, 4), generator=generator), boxes, torch.tensor([4, 0, 2])).to(DEVICE)
    select_implementation(model, kernels, attention)
    criterion = build_criterion(CONFIG.num_classes)
    model.implementation.apply_to(criterion)
    model.zero_grad()
    outputs = model(images, mask if padded else None)
    terms = criterion(outputs, targets)
    terms["loss"].backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {name: outputs[name] for name in ("pred_logits", "pred_boxes")} | terms, grads


@pytest.mark.parametrize("padded", [True, False], ids=["ragged", "one size"])
@pytest.mark.parametrize(("kernels", "attention"), FORMS, ids=["-".join(forms) for forms in FORMS])
def test_every_form_is_the_same_model(kernels: Kernels, attention: Attention, padded: bool) -> None:
    model = make_model()
    (values, grads), (expected, expected_grads) = (
        run(model, *forms, padded)
        for forms in ((kernels, attention), ("ref", "ref"))  # type: ignore[arg-type]
    )
    for name, value in expected.items():
        torch.testing.assert_close(
            values[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert grads.keys() == expected_grads.keys()
    total = sum(grad.norm() ** 2 for grad in expected_grads.values()) ** 0.5
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-5 * total, name


def test_dc5_too() -> None:
    model = make_model(dilation=True)
    values, expected = (run(model, *forms, True)[0] for forms in (("triton", "auto"), ("ref", "ref")))  # type: ignore[arg-type]
    torch.testing.assert_close(values["pred_logits"], expected["pred_logits"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_runs_as_it_is(dtype: torch.dtype) -> None:
    images = torch.randn(1, 3, 64, 64, dtype=dtype, device=DEVICE)
    outputs = make_model().eval().to(dtype)(images)
    assert outputs["pred_logits"].isfinite().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's choices are in tests/test_cuda.py")
def test_each_choice_has_its_reason() -> None:
    reasons = select_implementation(make_model())
    assert reasons["attention"].startswith("sdpa (") and reasons["assignment"].startswith("scipy (")
    assert reasons["frozen batch norm"] == "folded into convolutions" and "oneDNN" in reasons["convolution"]
    assert all("(" in reason for name, reason in reasons.items() if name != "frozen batch norm")
    model = make_model()
    plain = select_implementation(model, "ref")
    assert plain["assignment"].startswith("scipy (") and model.implementation.assignment == "scipy"
    assert plain["frozen batch norm"].startswith("by itself") and plain["attention"].startswith("ref (")
    live_norm = DETR(MODELS["detr_tiny"])
    assert not {"convolution", "frozen batch norm"} & select_implementation(live_norm).keys()


@pytest.mark.skipif(DEVICE == "cuda", reason="there it runs")
@pytest.mark.parametrize("option", ["kernels", "attention"])
def test_triton_on_a_cpu_without_its_interpreter_is_refused_at_once(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_kernels.dispatch.INTERPRETED", False)
    with pytest.raises(UserError, match=rf"--{option} triton cannot run: Triton has no CPU backend.*--{option} auto"):
        choose_runtime(RuntimeOptions(**{"device": "cpu", option: "triton"}))  # type: ignore[arg-type]


@pytest.mark.skipif(DEVICE == "cuda", reason="there it runs")
def test_xformers_on_a_cpu_is_refused_with_its_reason() -> None:
    runtime = choose_runtime(RuntimeOptions(device="cpu", attention="xformers"))
    with pytest.raises(UserError, match=r"--attention xformers: .*xformers has no cpu path"):
        place(make_model(), runtime)


def test_the_command_says_so_with_exit_code_2() -> None:
    command = [sys.executable, "-m", "detr_fast.train", "--device", "cpu", "--kernels", "tritn"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "triton" in result.stderr
