"""A training step on a GPU that is not there: tensors without data, so that nothing in it can ask the device for any.

Two guards. FakeTensorMode knows shapes and dtypes alone: what depends on values (`.item()`, `nonzero`, a boolean index)
raises there. On top of it a mode refuses every operation that takes something on the device and leaves it on the host;
it looks into our own operators too, which would be opaque: their launchers run, and only the launch itself is left out.

autograd wants a device that exists, so the GPU is torch's stand-in for a backend written in Python. It cannot be taken
back, which is why the checks run in a process of their own.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from detr_kernels import PackedImages, Selection
from detr_kernels.launch import launches_to
from detr_kernels.preprocessing.resize import Slot
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from detr_fast.config import MODELS
from detr_fast.data.batch import Batch, Targets
from detr_fast.model import backbone
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR
from detr_fast.options import Attention, Kernels
from detr_fast.runtime import Runtime
from detr_fast.training.criterion import build_criterion
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep

CONFIG = replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=2)


def test_in_a_process_of_its_own() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "python_functions=check_*",
        __file__,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout and "skipped" not in result.stdout


COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


class HostReadError(Exception):
    """Something left the device, or came from memory that the device cannot read by itself."""


class RefuseHostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        """Ours that ran."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "detr_kernels":
            self.operators.add(func.name().removeprefix("detr_kernels::"))
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        taken, given = ({x.device.type for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in (args, result))
        if taken - {"cpu"} and "cpu" in given:
            raise HostReadError(str(func))
        if "cpu" in taken and given - {"cpu"} and func.overloadpacket in COPIES:
            raise HostReadError(f"{func} from memory that is not pinned")
        return result


REFUSALS = (HostReadError, DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture(scope="module")
def device() -> torch.device:
    _setup_privateuseone_for_python_backend("absent")
    torch.absent.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]  # autocast asks
    return torch.device("absent", 0)


@pytest.fixture
def reads(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefuseHostReads]:
    """Refuses them; Triton counts as running on the device, and a ResNet has one block a stage."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    for module in ("launch", "attention.backends", "convolution.conv_bias_act"):
        monkeypatch.setattr(f"detr_kernels.{module}.why_not_triton", lambda _: None)
    with (
        FakeTensorMode(),
        launches_to(lambda *_, **__: None),
        torch.autograd.set_multithreading_enabled(False),  # a thread for a device that is not there would never end
        RefuseHostReads() as mode,
    ):
        yield mode


def make_batch(device: torch.device, padded: bool) -> Batch:
    """Two images of 48x64 to become 96x128, with up to five objects each, on the device; padded ones are recolored."""
    targets = Targets(
        torch.zeros(2, 5, dtype=torch.int64, device=device),
        torch.zeros(2, 5, 4, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    slots = tuple(Slot(index * 48 * 64 * 3, 48, 64, 96, 120 if padded else 128, index) for index in (0, 1))
    buffer = torch.zeros(2 * 48 * 64 * 3, dtype=torch.uint8, device=device)
    colors = torch.zeros(2, 3, 4, device=device) if padded else None
    images = PackedImages(buffer, torch.zeros(2, 6, dtype=torch.int64, device=device), slots, colors)
    return Batch(images, (96, 128), targets, [1, 2], torch.zeros(2, 2, dtype=torch.int64, device=device))


def make_step(
    device: torch.device, kernels: Kernels = "auto", attention: Attention = "sdpa", muon: bool = False
) -> TrainStep:
    runtime = Runtime(device, torch.float32, True, False, kernels, attention, {})
    with device:  # made there: a module of fake tensors cannot be moved
        model = DETR(CONFIG).train()
        ema = DETR(CONFIG).requires_grad_(False)
    select_backends(model, kernels, attention)
    optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4, muon)
    return TrainStep(model, build_criterion(CONFIG.num_classes), optimizer, runtime, ema=ema, ema_decay=0.9)


OURS = {
    "resize_normalize_pad",
    "conv1x1_bias_act",
    "conv1x1_input_gradient",
    "conv1x1_weight_gradient",
    "bias_act",
    "packed_attention",
    "packed_attention_backward",
    "add_layer_norm",
    "add_layer_norm_backward",
    "match_cost",
    "assignment",
    "set_loss",
    "set_loss_backward",
}


# all our kernels, and plain torch with the assignment on the device, as on a GPU where nothing was measured yet
@pytest.mark.parametrize(
    ("kernels", "attention", "expected"), [("triton", "auto", OURS), ("auto", "sdpa", {"assignment"})]
)
@pytest.mark.parametrize(("padded", "muon"), [(True, False), (False, False), (True, True)])
def check_that_a_whole_step_waits_for_nothing(
    kernels: Kernels,
    attention: Attention,
    expected: set[str],
    padded: bool,
    muon: bool,
    device: torch.device,
    reads: RefuseHostReads,
) -> None:
    """Normalising, forward, cost, assignment, loss, backward, clipping, AdamW and the average; dropout included."""
    step = make_step(device, kernels, attention, muon)
    if muon:
        step.optimizer.param_groups[0]["lr"] = torch.zeros((), device=device)  # as of a captured step
    terms = step([make_batch(device, padded)])
    assert all(value.device == device for value in terms.values())
    assert all(parameter.grad is not None and parameter.grad.device == device for parameter in step.trained)
    assert reads.operators == expected


def check_that_scipys_assignment_is_seen_to_wait(device: torch.device, reads: RefuseHostReads) -> None:
    step = make_step(device)
    step.criterion.use(Selection.named(assignment="scipy"))
    with pytest.raises(HostReadError):
        step([make_batch(device, True)])
    assert reads.operators == {"assignment_scipy"}


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "a boolean index": lambda x: x[x > 0],
    "a branch": lambda x: bool(x.sum() > 0),
    "a copy": lambda x: x.cpu(),
    "a number from the host": lambda x: torch.tensor(1.0).to(x.device),
}


class Reading(torch.autograd.Function):
    """Does nothing, and reads: in the forward or in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[Tensor], Any], backward: bool) -> Tensor:
        ctx.read = read if backward else lambda _: None
        if not backward:
            read(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.read(dy)
        return dy, None, None


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.usefixtures("reads")
def check_that_a_planted_read_is_seen(read: Callable[[Tensor], Any], backward: bool, device: torch.device) -> None:
    step = make_step(device)
    plant: Any = lambda _, __, output: Reading.apply(output, read, backward)  # noqa: E731
    step.model.transformer.encoder.layers[-1].register_forward_hook(plant)
    with pytest.raises(REFUSALS):
        step([make_batch(device, True)])
