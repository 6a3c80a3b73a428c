"""Backends of a whole network: all are the same model, each choice has its reason, and what runs is what is printed."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from detr_kernels import OPERATIONS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.config import MODELS, UserError
from detr_fast.data.batch import Targets
from detr_fast.detector import Detector, place, runtime_of
from detr_fast.model import backbone
from detr_fast.model.backends import hand_out, reasons, select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.options import Attention, Kernels, RuntimeOptions
from detr_fast.preprocessing import Preprocessing
from detr_fast.runtime import choose_runtime
from detr_fast.training.criterion import build_criterion
from tests.factories import NARROW
from tests.kernel_inputs import DEVICE

ASKED: list[tuple[Kernels, Attention]] = [("auto", "auto"), ("triton", "auto"), ("triton", "sdpa"), ("ref", "triton")]


@pytest.fixture(autouse=True)
def exact_convolutions(one_narrow_block_a_stage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would hide a mistake."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_model(dilation: bool = False) -> DETR:
    torch.manual_seed(0)
    model = DETR(replace(NARROW, dilation=dilation)).train()
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
    select_backends(model, kernels, attention)
    criterion = build_criterion(NARROW.num_classes)
    hand_out(model.selection, criterion)
    model.zero_grad()
    outputs = model(images, mask if padded else None)
    terms = criterion(outputs, targets)
    terms["loss"].backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {name: outputs[name] for name in ("pred_logits", "pred_boxes")} | terms, grads


@pytest.mark.parametrize("padded", [True, False], ids=["ragged", "one size"])
@pytest.mark.parametrize(("kernels", "attention"), ASKED, ids=["-".join(asked) for asked in ASKED])
def test_every_backend_is_the_same_model(kernels: Kernels, attention: Attention, padded: bool) -> None:
    model = make_model()
    (values, grads), (expected, expected_grads) = (
        run(model, *forms, padded) for forms in ((kernels, attention), ("ref", "ref"))
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
    values, expected = (run(model, *forms, True)[0] for forms in (("triton", "auto"), ("ref", "ref")))
    torch.testing.assert_close(values["pred_logits"], expected["pred_logits"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_runs_as_it_is(dtype: torch.dtype) -> None:
    images = torch.randn(1, 3, 64, 64, dtype=dtype, device=DEVICE)
    outputs = make_model().eval().to(dtype)(images)
    assert outputs["pred_logits"].isfinite().all()


def printed(model: DETR, kernels: Kernels = "auto", attention: Attention = "auto", training: bool = True) -> dict:
    return reasons(model, select_backends(model, kernels, attention), training)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's choices are in tests/test_cuda.py")
def test_each_choice_has_its_reason() -> None:
    found = printed(make_model())
    assert found["attention"].startswith("sdpa (") and found["assignment"].startswith("scipy (")
    assert found["frozen batch norm"].startswith("folded (folded into") and "oneDNN" in found["convolution"]
    assert found["residual stage"].startswith("onednn (") and all("(" in reason for reason in found.values())
    assert found["layer norm"] == "ref (as preprocessing)" and "triton" in found["preprocessing"]
    assert "dropout" not in found and "packed convolution" not in found  # there is none; it is for inference
    assert printed(make_model(), training=False)["packed convolution"].startswith("onednn (")
    plain = printed(make_model(), "ref")
    assert plain.keys() == found.keys() and plain.pop("assignment") == "scipy (asked for)"
    assert set(plain.values()) == {"ref (asked for)"}
    live_norm = DETR(MODELS["detr_tiny"])
    assert not {"convolution", "frozen batch norm", "residual stage"} & printed(live_norm).keys()


OPERATORS = {
    "detr_kernels::residual_stage": "residual_stage",
    "detr_kernels::conv_bias_act_library": "convolution",
    "detr_kernels::blocked_attention": "attention",
    "detr_kernels::dropout": "dropout",
    "detr_kernels::relu_dropout": "dropout",
}
"""Custom operator -> the operation whose fast backend on a CPU runs it."""
FAST = {"residual_stage": "onednn", "convolution": "onednn", "attention": "blocked", "dropout": "pcg64"}


class Operators(TorchDispatchMode):
    """Remembers which custom operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cuda", reason="these are a CPU's")
@pytest.mark.parametrize(
    ("kernels", "attention", "fast"),
    [
        ("auto", "auto", set(FAST)),
        ("auto", "sdpa", set(FAST) - {"attention"}),  # asked for by name, it is what runs
        ("ref", "auto", set()),  # DETR's own sequence of operations, in training too
        ("ref", "blocked", {"attention"}),
    ],
)
def test_what_was_chosen_is_what_runs(kernels: Kernels, attention: Attention, fast: set[str]) -> None:
    """Holds each choice that torch would let pass unseen: dropout's numbers, attention with dropout, a whole stage."""
    torch.manual_seed(0)
    model = DETR(replace(NARROW, dropout=0.1)).train()
    selection = select_backends(model, kernels, attention)
    with Operators() as operators:
        model(torch.randn(1, 3, 64, 64))["pred_logits"].sum().backward()
    assert {OPERATORS[name] for name in operators.seen if name in OPERATORS} == fast
    assert {name for name, backend in FAST.items() if selection.backend(name, training=True) == backend} == fast


KERNELS = "conv1x1_bias_act bias_act packed_attention add_layer_norm match_cost assignment set_loss"
OURS = {f"detr_kernels::{name}" for name in KERNELS.split()}


@pytest.mark.parametrize("kernels", ["triton", "ref"])
def test_every_kernel_of_ours_runs_where_it_is_asked_for(kernels: Kernels) -> None:
    """The results are the same, whichever runs."""
    model = make_model()
    with Operators() as operators:
        run(model, kernels, "auto", padded=True)
    assert operators.seen & OURS == (OURS if kernels == "triton" else set())
    assert Preprocessing.of(model, runtime_of(model)).backend == kernels


@pytest.mark.skipif(DEVICE == "cuda", reason="these are a CPU's")
@pytest.mark.parametrize("name", FAST)
def test_the_reference_of_one_operation_runs_beside_the_others_backends(name: str) -> None:
    model = DETR(replace(NARROW, dropout=0.1)).train()
    select_backends(model, named={name: OPERATIONS[name].reference})
    with Operators() as operators:
        model(torch.randn(1, 3, 64, 64))["pred_logits"].sum().backward()
    assert {OPERATORS[seen] for seen in operators.seen if seen in OPERATORS} == set(FAST) - {name}


@pytest.mark.skipif(DEVICE == "cuda", reason="these are a CPU's")
@pytest.mark.parametrize("packed", ["onednn", "ref"])
def test_what_was_chosen_is_what_runs_in_optimised_inference(packed: str) -> None:
    """Packed weights go to oneDNN itself, others through our operator."""
    network = make_model().eval()
    select_backends(network, named={"packed_convolution": packed})
    made = optimized(network, torch.float32)
    with torch.no_grad(), Operators() as operators:
        made(torch.randn(1, 3, 64, 64))
    assert ("detr_kernels::conv_bias_act_library" in operators.seen) == (packed == "ref")


@pytest.mark.skipif(DEVICE == "cuda", reason="these are a CPU's")
@pytest.mark.parametrize("tiny", [False, True])
def test_what_is_printed_of_optimised_inference_is_what_runs(tiny: bool) -> None:
    """Frozen or live, batch norm is folded for good, and no stage is one operator then."""
    detector = Detector(DETR(MODELS["detr_tiny"]) if tiny else make_model())
    runtime = choose_runtime(RuntimeOptions(device="cpu", precision="fp32"))
    runtime.reasons["residual stage"] = "onednn (of a network that it was chosen for before)"
    detector.optimize(runtime)
    printed = {name for name in runtime.reasons if name.replace(" ", "_") in OPERATIONS}
    assert printed == {"preprocessing", "convolution", "packed convolution", "attention", "layer norm"}
    with torch.no_grad(), Operators() as operators:
        detector(torch.randn(1, 3, 64, 64))
    assert "detr_kernels::residual_stage" not in operators.seen


@pytest.mark.parametrize("tiny", [False, True])
def test_what_is_asked_for_runs_in_optimised_inference(tiny: bool) -> None:
    network = DETR(MODELS["detr_tiny"]) if tiny else make_model()
    made = optimized(place(network.eval(), replace(runtime_of(network), kernels="triton")), torch.float32)
    with torch.no_grad(), Operators() as operators:
        made(torch.randn(1, 3, 64, 64, device=DEVICE))
    assert {"detr_kernels::conv1x1_bias_act", "detr_kernels::bias_act"} <= operators.seen
    assert "detr_kernels::conv_bias_act_library" not in operators.seen


@pytest.mark.skipif(DEVICE == "cuda", reason="these are a CPU's")
def test_a_backend_of_one_mode_leaves_the_other_to_auto() -> None:
    selection = select_backends(DETR(NARROW), named={"packed_convolution": "onednn"})
    assert [selection.backend("packed_convolution", training) for training in (True, False)] == ["ref", "onednn"]
    with pytest.raises(UserError, match="frozen batch norm by foreach: it saves launches on a GPU"):
        select_backends(DETR(NARROW), named={"frozen_batch_norm": "foreach"})


@pytest.mark.skipif(DEVICE == "cuda", reason="these are a CPU's")
@pytest.mark.parametrize("amx", [False, True])
def test_attention_in_bfloat16_is_ours_where_it_was_measured(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    for dtype, expected in ((torch.bfloat16, "sdpa" if amx else "blocked"), (torch.float32, "sdpa")):
        selection = select_backends(DETR(NARROW), dtype=dtype)
        assert [selection.backend("attention", training) for training in (True, False)] == [expected] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="there it runs")
@pytest.mark.parametrize("option", ["kernels", "attention"])
def test_triton_on_a_cpu_without_its_interpreter_is_refused_at_once(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detr_kernels.launch.INTERPRETED", False)
    with pytest.raises(UserError, match=rf"--{option} triton cannot run: Triton has no CPU backend.*--{option} auto"):
        choose_runtime(RuntimeOptions(**{"device": "cpu", option: "triton"}))


@pytest.mark.skipif(DEVICE == "cuda", reason="there it runs")
def test_xformers_on_a_cpu_is_refused_with_its_reason() -> None:
    runtime = choose_runtime(RuntimeOptions(device="cpu", attention="xformers"))
    with pytest.raises(UserError, match=r"--attention xformers: .*xformers has no cpu path"):
        place(make_model(), runtime)


def test_the_command_says_so_with_exit_code_2() -> None:
    command = [sys.executable, "-m", "detr_fast.train", "--device", "cpu", "--kernels", "tritn"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "triton" in result.stderr and "Traceback" not in result.stderr
