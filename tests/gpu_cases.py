"""What has to hold on a GPU, for the real one where it is there, and else for one that is not (`absent_gpu`).

`test_absent_gpu.py` runs this file in a process of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from detr_profiling.absent_gpu import absent_gpu, moved
from detr_profiling.launches import Graphs, compile_at, inputs_of, loss_of, make_batch, make_step
from torch._dynamo.utils import counters

from detr_fast.config import MODELS, Attention, Kernels
from detr_fast.model import backbone
from detr_fast.model.detr import DETR
from detr_fast.model.freezing import frozen

HAS_GPU = torch.cuda.is_available()
CONFIG = replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=2)
FORMS: list[tuple[Kernels, Attention]] = [
    ("auto", "auto"),
    ("auto", "xformers"),
    ("auto", "sdpa"),
    ("triton", "triton"),
    ("ref", "ref"),
]
NAMES = ["-".join(forms) for forms in FORMS]
FAST = FORMS[0], FORMS[3]
ROOM = (96, 128)
ROOMS = [(96 + 32 * (index % 5), 128 + 32 * (index % 4)) for index in range(10)]
"""Ten rooms, both sides of which change at once."""

per_form = pytest.mark.parametrize(("kernels", "attention"), FORMS, ids=NAMES)
ragged_or_not = pytest.mark.parametrize("padded", [True, False], ids=["ragged", "one size"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device; a ResNet has one block a stage."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    with nullcontext(torch.device("cuda", 0)) if HAS_GPU else absent_gpu() as device:
        yield device


@per_form
@ragged_or_not
def check_that_model_and_loss_are_one_graph(
    kernels: Kernels, attention: Attention, padded: bool, gpu: torch.device
) -> None:
    batch = make_batch(gpu, 2, ROOM, padded)
    assert compile_at(make_step(CONFIG, gpu, kernels, attention), [batch], "eager") == {"graphs": 1, "breaks": 0}


@pytest.mark.parametrize(("kernels", "padded"), [("auto", True), ("triton", False)])
def check_that_ten_shapes_are_two_graphs(kernels: Kernels, padded: bool, gpu: torch.device) -> None:
    """The first shape's own, and one for all others."""
    step = make_step(CONFIG, gpu, kernels)
    batches = [make_batch(gpu, 2, room, padded) for room in ROOMS]
    assert compile_at(step, batches, "eager") == {"graphs": 2, "breaks": 0}


@pytest.mark.parametrize(("kernels", "padded"), [("auto", True), ("triton", False)])
def check_that_the_backward_pass_is_traced_too(kernels: Kernels, padded: bool, gpu: torch.device) -> None:
    step, batch, graphs = make_step(CONFIG, gpu, kernels), make_batch(gpu, 2, ROOM, padded), Graphs()
    torch._dynamo.reset()
    torch.compile(loss_of(step), fullgraph=True, backend=graphs.backend)(*inputs_of(step, batch)).backward()
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert all(each.grad is not None and each.grad.device == gpu for each in step.trained)


@pytest.mark.parametrize(("kernels", "attention"), FAST)
@ragged_or_not
def check_that_optimized_inference_is_one_graph(
    kernels: Kernels, attention: Attention, padded: bool, gpu: torch.device
) -> None:
    step = make_step(CONFIG, gpu, kernels, attention)
    model = made_there(lambda: frozen(DETR(CONFIG), torch.bfloat16), gpu)
    step.model.implementation.apply_to(model)
    images, mask, _ = inputs_of(step, make_batch(gpu, 2, ROOM, padded))
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        outputs = torch.compile(model, fullgraph=True, backend="eager")(images, mask)
    assert outputs["pred_logits"].device == gpu
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def made_there(make: Callable[[], DETR], gpu: torch.device) -> DETR:
    return make().to(gpu) if HAS_GPU else moved(make)
