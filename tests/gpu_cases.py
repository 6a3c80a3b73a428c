"""What has to hold on a GPU, for the real one where it is there, and else for one that is not (`absent_gpu`).

`test_absent_gpu.py` runs this file in a process of its own.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from detr_profiling.absent_gpu import absent_gpu, made_on
from detr_profiling.launches import (
    Graphs,
    LaunchesOptions,
    compile_at,
    count_step,
    inputs_of,
    main,
    make_batch,
    make_step,
)
from torch._dynamo.utils import counters

from detr_fast.config import BEYOND_DETR, MODELS, ModelConfig, UserError
from detr_fast.model import backbone
from detr_fast.model.backends import hand_out, select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.options import Attention, Kernels

HAS_GPU = torch.cuda.is_available()
CONFIG = replace(MODELS["detr_r50"], encoder_layers=1, decoder_layers=2)
FAST: list[tuple[Kernels, Attention]] = [("auto", "auto"), ("triton", "triton")]
ONE_GRAPH: list[tuple[Kernels, Attention, bool]] = [
    ("auto", "auto", False),  # sdpa
    ("auto", "xformers", True),
    ("auto", "xformers", False),
    ("triton", "triton", True),
    ("ref", "ref", True),
    ("ref", "ref", False),
]
"""Kernels, attention and whether an image is padded, for which no other check below compiles model and loss."""
ROOM = (96, 128)
PADDED_SIZES = [(96 + 32 * (index % 5), 128 + 32 * (index % 4)) for index in range(10)]
"""Ten sizes of a batch, both sides of which change at once."""

ragged_or_not = pytest.mark.parametrize("padded", [True, False], ids=["ragged", "one size"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device; a ResNet has one block a stage."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (1, 1, 1, 1))
    with nullcontext(torch.device("cuda", 0)) if HAS_GPU else absent_gpu() as device:
        yield device


BY_TRITON = {
    *("conv1x1_bias_act", "conv1x1_input_gradient", "conv1x1_weight_gradient", "bias_act", "resize_normalize_pad"),
    *("packed_attention", "packed_attention_backward", "add_layer_norm", "add_layer_norm_backward"),
    *("match_cost", "assignment", "set_loss", "set_loss_backward"),
}
BY_XFORMERS = {"assignment", "xformers_attention", "xformers_attention_backward"}


@pytest.mark.parametrize(
    ("kernels", "attention", "expected", "most"),
    [
        ("auto", "auto", {"assignment"}, 1001),  # torch's attention in pieces: which of its kernels runs, no fake tells
        ("auto", "xformers", BY_XFORMERS, 874),
        ("triton", "triton", BY_TRITON, 637),
    ],
    ids=["auto", "xformers", "triton"],
)
@ragged_or_not
def check_that_a_step_waits_for_nothing_and_launches_little(
    kernels: Kernels, attention: Attention, expected: set[str], most: int, padded: bool, gpu: torch.device
) -> None:
    """Pixels, forward and backward pass, loss, AdamW and the average, in bf16."""
    launches = count_step(make_step(CONFIG, gpu, kernels, attention), make_batch(gpu, 2, ROOM, padded))
    assert not launches.synchronizations and launches.ours == expected
    assert sum(launches.totals().values()) <= most, launches.totals()


PROPOSING = replace(CONFIG, **{name: getattr(MODELS["detr_lite"], name) for name in BEYOND_DETR})


@pytest.mark.parametrize(
    ("config", "attention"), [(CONFIG, "triton"), (PROPOSING, "xformers")], ids=["detr", "proposing"]
)
def check_that_query_sets_wait_for_nothing(config: ModelConfig, attention: Attention, gpu: torch.device) -> None:
    """Whatever the number of targets, the step launches the same, and model and loss are one graph for two sizes."""
    step, counted = make_step(config, gpu, "triton", attention, groups=2, denoising=2), []
    for targets in (0, 1, 16, 64):
        launches = count_step(step, make_batch(gpu, 2, ROOM, True, targets))
        assert not launches.synchronizations and step.names.count("loss_denoising") == 1
        counted.append(launches.totals())
    assert counted[1:] == counted[:-1]
    batches = [make_batch(gpu, 2, ROOM, True, targets) for targets in (16, 32, 64)]
    assert compile_at(step, batches, "eager") == {"graphs": 2, "breaks": 0}


def check_launches_at_the_real_depth(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """DETR-R50, two ragged images; attention by xformers, as the fake device shows torch's attention in pieces."""
    monkeypatch.setitem(backbone.DEPTHS, "resnet50", (3, 4, 6, 3))
    launches = count_step(make_step(MODELS["detr_r50"], gpu, "auto", "xformers"), make_batch(gpu, 2, ROOM, True))
    assert not launches.synchronizations
    most = {
        **{"pixels": 36, "forward": 28, "backbone": 182, "encoder": 180, "decoder": 268, "heads": 20},
        **{"loss": 108, "matching": 43, "backward": 973, "optimizer": 233},
    }
    counted = launches.totals()
    assert counted.keys() == most.keys() and all(counted[name] <= most[name] for name in most), counted


def check_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = LaunchesOptions(model="detr_tiny", batch_size=2, size=(64, 64), compile=False)
    with pytest.raises(UserError, match="trace") if HAS_GPU else nullcontext():
        assert main(options) == 0
    printed = capsys.readouterr().out
    assert HAS_GPU or ("attention: sdpa (" in printed and printed.count("0 device synchronisations") == 2)


@pytest.mark.parametrize("name", ["detr_r50", "detr_r50_dc5"])
def check_every_convolution_by_cudnn(name: str, gpu: torch.device) -> None:
    """With a ReLU in one call, which is two launches less; without one as before. In training, and as one graph."""
    config = replace(MODELS[name], encoder_layers=1, decoder_layers=2)
    step, batch = make_step(config, gpu), make_batch(gpu, 2, ROOM, True)
    before = count_step(step, batch).totals()["backbone"]
    select_backends(step.model, named={"convolution": "cudnn"})
    launches = count_step(step, batch)
    with_relu, joined = 1 + 4 * 3, 4
    assert launches.totals()["backbone"] == before - 2 * with_relu - joined
    assert launches.by_range["backbone"]["detr_kernels::conv_bias_act_library"] == with_relu
    if config.dilation:  # which has all that the other has
        assert compile_at(step, [batch], "eager") == {"graphs": 1, "breaks": 0}


@pytest.mark.parametrize(("kernels", "attention", "padded"), ONE_GRAPH)
def check_that_model_and_loss_are_one_graph(
    kernels: Kernels, attention: Attention, padded: bool, gpu: torch.device
) -> None:
    batch = make_batch(gpu, 2, ROOM, padded)
    assert compile_at(make_step(CONFIG, gpu, kernels, attention), [batch], "eager") == {"graphs": 1, "breaks": 0}


@pytest.mark.parametrize(("kernels", "attention", "padded"), [("auto", "auto", True), ("triton", "triton", False)])
def check_that_ten_shapes_are_two_graphs(
    kernels: Kernels, attention: Attention, padded: bool, gpu: torch.device
) -> None:
    """The first shape's own, and one for all others."""
    step = make_step(CONFIG, gpu, kernels, attention)
    batches = [make_batch(gpu, 2, padded_size, padded) for padded_size in PADDED_SIZES]
    assert compile_at(step, batches, "eager") == {"graphs": 2, "breaks": 0}


def check_that_the_backward_pass_is_traced_too(gpu: torch.device) -> None:
    step, batch, graphs = make_step(CONFIG, gpu), make_batch(gpu, 2, ROOM, True), Graphs()
    assert compile_at(step, [batch], graphs.backend, backward=True) == {"graphs": 1, "breaks": 0}
    assert len(graphs.forward) == len(graphs.backward) == 1
    assert all(each.grad is not None and each.grad.device == gpu for each in step.trained)


@pytest.mark.parametrize(("kernels", "attention"), FAST)
@ragged_or_not
def check_that_optimized_inference_is_one_graph(
    kernels: Kernels, attention: Attention, padded: bool, gpu: torch.device
) -> None:
    step = make_step(CONFIG, gpu, kernels, attention)
    model = made_on(gpu, lambda: optimized(DETR(CONFIG), torch.bfloat16))
    hand_out(step.model.selection, model)
    images, mask, _ = inputs_of(step, make_batch(gpu, 2, ROOM, padded))
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        outputs = torch.compile(model, fullgraph=True, backend="eager")(images, mask)
    assert outputs["pred_logits"].device == gpu
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
