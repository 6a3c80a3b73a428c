"""FLOPs and bytes of each stage, against what a hand counts."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import detr_kernels
import pytest
import torch
from detr_kernels import OPERATIONS
from detr_profiling.limits.counting import NOTHING
from detr_profiling.limits.flops import has_products
from detr_profiling.limits.roofline import Work, count_work
from detr_profiling.measuring.techniques import REFERENCES
from detr_profiling.own_workload import build_workload
from detr_profiling.workload import WorkloadOptions
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from detr_fast.config import model_config
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR
from detr_fast.profiler_ranges import profiler_range

FLOAT = 4
"""Bytes."""
OPTIONS = WorkloadOptions(size="64x96", batch_size=2, device="cpu", precision="fp32", objects=3, threads=1)


def flop_of(run: Callable[[], Any]) -> int:
    return sum(count_work(run).values(), NOTHING).flop


def test_every_operator_of_ours_has_a_formula_or_no_products() -> None:
    names = {name.removeprefix("detr_kernels::").split(".")[0] for name in operator_names()}
    assert len(names) >= 17
    formulas = {name for operation in OPERATIONS.values() for name in operation.flop}
    assert formulas == names
    assert has_products(torch.ops.detr_kernels.residual_stage.default)
    assert not has_products(torch.ops.detr_kernels.dropout.default)


def operator_names() -> list[str]:
    assert detr_kernels.__file__  # imported, so registered
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("detr_kernels::")]


# a linear layer, x (8, 5) -> (8, 3): each of its three products has 8 x 5 x 3 multiply-adds

PRODUCT = 2 * 8 * 5 * 3


def test_linear_layer() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(8, 5)
    with torch.no_grad():
        (work,) = count_work(lambda: layer(x)).values()
    assert work == Work(PRODUCT, FLOAT * (40 + 15 + 3 + 24), FLOAT * (40 + 15 + 3 + 24))


def test_linear_layer_in_inference_mode() -> None:
    """There its operator arrives whole."""
    layer, x = nn.Linear(5, 3), torch.randn(8, 5)
    with torch.inference_mode():
        assert flop_of(lambda: layer(x)) == PRODUCT


def test_stages_of_a_training_step() -> None:
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(8, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)

    def step() -> None:
        with profiler_range("forward"):
            with profiler_range("encoder"):
                y = layer(x)
            loss = y.exp().sum()
        with profiler_range("backward"):
            loss.backward()
        with profiler_range("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    work = count_work(step)
    assert list(work) == ["forward", "encoder", "backward", "optimizer"]
    assert [work[name].flop for name in work] == [0, PRODUCT, PRODUCT, 0]  # x wants no gradient
    # x and the weight come from outside, y goes on
    assert work["encoder"].minimum_bytes == FLOAT * (40 + 15 + 24)
    # y comes in, exp(y) goes on to the backward pass; the sum is dropped
    assert work["forward"].minimum_bytes == FLOAT * (24 + 24)
    assert work["forward"].moved_bytes == FLOAT * (24 + 24 + 24 + 1)
    # exp(y) and x come in, the weight's gradient goes on; dy lives and dies here
    assert work["backward"].minimum_bytes == FLOAT * (24 + 40 + 15)
    # weight and gradient come in, the weight stays
    assert work["optimizer"].minimum_bytes == FLOAT * (15 + 15 + 15)


def test_what_lives_and_dies_in_a_stage_moves_but_need_not() -> None:
    x = torch.randn(100)
    (work,) = count_work(lambda: x.exp().sin().neg()).values()
    assert work == Work(0, FLOAT * 200, FLOAT * 600)


def test_what_only_a_cycle_holds_is_dead() -> None:
    x = torch.randn(100)

    def run() -> None:
        cycle: list[Any] = [x.exp()]
        cycle.append(cycle)

    gc.disable()  # or it may come by itself
    (work,) = count_work(run).values()
    gc.enable()
    assert work.minimum_bytes == FLOAT * 100


def test_views_are_free_and_parts_count_as_parts() -> None:
    x = torch.randn(10, 10)
    (work,) = count_work(lambda: x.t()[:3].unsqueeze(0).expand(5, 3, 10).neg()).values()
    assert work == Work(0, FLOAT * (30 + 150), FLOAT * (30 + 150))  # of the expanded dimension there is one entry
    (work,) = count_work(lambda: [x[:5] + 1, x[5:] + 1, x + x]).values()
    assert work.minimum_bytes == FLOAT * (100 + 200) and work.moved_bytes == FLOAT * (200 + 200)


def test_memory_that_is_taken_but_not_written_does_not_count() -> None:
    assert not count_work(lambda: torch.empty(100))
    (work,) = count_work(lambda: torch.empty(100).fill_(1)).values()  # fill does not read
    assert work == Work(0, FLOAT * 100, FLOAT * 100)
    (work,) = count_work(lambda: torch.ones(100).add_(1)).values()  # add does
    assert work == Work(0, FLOAT * 100, FLOAT * 300)


def test_storages_are_told_apart_when_they_are_gone() -> None:
    """torch soon gives an address that is free to another storage: it says nothing."""
    x, times = torch.randn(10), 300

    def run() -> None:
        for _ in range(times):
            with profiler_range("forward"):
                y = x.neg()
            with profiler_range("loss"):
                y.exp()

    work = count_work(run)
    assert work["loss"].minimum_bytes == times * FLOAT * 10
    assert work["forward"].minimum_bytes == FLOAT * (10 + times * 10)


def test_what_is_overwritten_in_another_stage() -> None:
    buffer = torch.zeros(100)

    def run() -> None:
        with profiler_range("forward"):
            buffer.fill_(1)
        with profiler_range("loss"):
            buffer[:40].fill_(2)
        with profiler_range("backward"):
            buffer.fill_(3)

    work = count_work(run)
    assert work["forward"].minimum_bytes == FLOAT * 100  # part of it remains
    assert work["loss"].minimum_bytes == 0  # overwritten before anybody read it
    assert work["backward"].minimum_bytes == FLOAT * 100


def test_fused_optimizer_reads_gradients_and_leaves_them() -> None:
    layer = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    (work,) = count_work(optimizer.step).values()
    count = 2 * FLOAT  # of steps done
    assert work.minimum_bytes == FLOAT * 100 * (4 + 3) + count  # weight, gradient and two moments in, all but one out


def test_convolution_backward_counts_the_gradients_that_are_wanted() -> None:
    x, conv = torch.randn(2, 4, 9, 7), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    forward = 2 * (2 * 5 * 4) * 6 * 4 * 9
    for wants_x, wants_weight in ((True, True), (True, False), (False, True)):
        x.requires_grad_(wants_x)
        conv.weight.requires_grad_(wants_weight)
        assert flop_of(lambda: conv(x).sum().backward()) == forward * (1 + wants_x + wants_weight)
        with FlopCounterMode(display=False) as counter:
            conv(x).sum().backward()
        assert counter.get_total_flops() == forward * (1 + wants_x + wants_weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_in_groups(transposed: bool) -> None:
    """Of which torch's own formula counts the weight's gradient too often."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    x, conv = torch.randn(2, 8, 6, 6, requires_grad=True), kind(8, 8, 3, groups=4, bias=False)
    pixels = 6 * 6 if transposed else 4 * 4
    assert flop_of(lambda: conv(x).sum().backward()) == 3 * 2 * (2 * pixels) * 8 * (8 // 4) * 9


@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_weights_in_memory(masked: bool) -> None:
    """2 images, 4 heads, 5 queries, 7 keys, width 8: torch runs its CPU kernel, of which its counter knows nothing."""
    q, k, v = (torch.randn(2, 4, length, 8, requires_grad=True) for length in (5, 7, 7))
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool) if masked else None
    forward = 2 * (2 * 2 * 4 * 5 * 7 * 8)
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, k, v, mask)
    assert counter.get_total_flops() == forward
    operators = {str(each) for each in counter.get_flop_counts()["Global"]}
    assert operators == {"aten._scaled_dot_product_flash_attention_for_cpu"}
    assert flop_of(lambda: F.scaled_dot_product_attention(q, k, v, mask).sum().backward()) == 3 * forward


# our own operators


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_1x1(stride: int) -> None:
    x, weight = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(6, 3, 1, 1, requires_grad=True)
    bias = torch.randn(6)
    pixels = 2 * math.ceil(5 / stride) * math.ceil(4 / stride)
    run = lambda: detr_kernels.conv1x1_bias_act(x, weight, bias, None, stride).sum().backward()  # noqa: E731
    assert flop_of(run) == 3 * 2 * pixels * 6 * 3
    weight.requires_grad_(False)
    assert flop_of(run) == 2 * 2 * pixels * 6 * 3


def test_convolution_of_a_library() -> None:
    with FakeTensorMode():
        x, weight, bias = torch.empty(2, 4, 9, 7), torch.empty(6, 4, 3, 3), torch.empty(6)
        run = lambda: torch.ops.detr_kernels.conv_bias_act_library(x, weight, bias, None, 2, 1, 1, True, "cudnn")  # noqa: E731
        assert flop_of(run) == 2 * (2 * 5 * 4) * 6 * 4 * 9


@pytest.mark.parametrize("residual", [False, True])
def test_a_packed_convolution_of_onednn(residual: bool) -> None:
    x, weight = torch.randn(2, 4, 9, 7), torch.randn(6, 4, 3, 3)
    convolution = detr_kernels.OneDNNConvolution(weight, torch.randn(6), 2, 1, 1)
    added = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last) if residual else None
    assert flop_of(lambda: convolution(x, added, True)) == 2 * (2 * 5 * 4) * 6 * 4 * 9
    assert flop_of(lambda: convolution(x, added, True)) == 2 * (2 * 5 * 4) * 6 * 4 * 9  # packed now


@pytest.mark.parametrize("form", ["packed_attention", "xformers_attention"])
def test_packed_attention_counts_as_if_padded(form: str) -> None:
    """2 images of at most 5 queries and 7 keys in 9 and 12 rows; 4 heads of width 8."""
    with FakeTensorMode():  # no data: nothing could be read from the cu_seqlens
        q, k, v = (torch.empty(rows, 4, 8, requires_grad=True) for rows in (9, 12, 12))
        cu_seqlens, seed = torch.empty(3, dtype=torch.int32), torch.empty(1, dtype=torch.int64)
        forward = 2 * (2 * 2 * 4 * 5 * 7 * 8)
        operator = getattr(torch.ops.detr_kernels, form)
        rest = (seed, [5, 7], 0.0) if form == "packed_attention" else (5, 7, 0.0)
        assert flop_of(lambda: operator(q, k, v, cu_seqlens, cu_seqlens, *rest)) == forward
        assert flop_of(lambda: operator(q, k, v, cu_seqlens, cu_seqlens, *rest)[0].sum().backward()) == 3 * forward


# the detector


def training_step_flop(named: dict[str, str] | None, padded: bool, dropout: float = 0.0) -> tuple[int, int]:
    """Of forward alone and with backward, an 800 x 1066 image, without computing anything."""
    with FakeTensorMode():
        model = DETR(model_config("detr_r50", dropout=dropout)).train()
        if named is not None:
            select_backends(model, named=named)
        images, mask = torch.empty(1, 3, 800, 1066), torch.empty(1, 800, 1066, dtype=torch.bool) if padded else None

        def run() -> None:
            with profiler_range("forward"):
                outputs = model(images, mask)
            loss = sum(
                layer[name].sum()
                for layer in (outputs, *outputs["aux_outputs"])
                for name in ("pred_logits", "pred_boxes")
            )
            with profiler_range("backward"):
                loss.backward()

        work = count_work(run)
        total = sum(work.values(), NOTHING).flop
        return total - work["backward"].flop, total


TRITON = {"attention": "triton", "convolution": "triton", "residual_stage": "ref", "layer_norm": "triton"}


@pytest.mark.parametrize(
    ("named", "padded", "dropout"),
    [
        (REFERENCES, True, 0.1),
        (None, False, 0.0),  # torch's attention kernel
        (TRITON, True, 0.1),  # ours, packed
    ],
    ids=["ref", "auto", "triton"],
)
def test_detr_r50_is_what_we_say_on_any_backend(named: dict[str, str] | None, padded: bool, dropout: float) -> None:
    forward, step = training_step_flop(named, padded, dropout)
    assert forward == 162_490_112_000  # "162 GFLOP forward and 427 a training step", so operations, not multiply-adds
    assert step == 426_926_643_200


def test_a_real_step_of_every_form_is_the_same_work() -> None:
    counts = {}
    for form in ("ref", "auto", "triton"):
        options = replace(OPTIONS, model="detr_tiny", size="32x32", kernels=form)
        counts[form] = count_work(build_workload(options).run)
    flop = {form: {name: work.flop for name, work in stages.items() if work.flop} for form, stages in counts.items()}
    assert flop["ref"] == flop["auto"] == flop["triton"]
    assert flop["ref"].keys() == {"backbone", "encoder", "decoder", "heads", "backward"}
    # a fused form moves less
    assert counts["triton"]["encoder"].moved_bytes < counts["ref"]["encoder"].moved_bytes
    for stages in counts.values():
        assert all(work.minimum_bytes <= work.moved_bytes for work in stages.values())


def test_inference_moves_at_least_images_weights_and_outputs() -> None:
    workload = build_workload(replace(OPTIONS, mode="inference"))
    workload.run()
    work = count_work(workload.run)
    weights = sum(each.nbytes for each in (*workload.model.backbone.parameters(), *workload.model.backbone.buffers()))  # type: ignore[union-attr]
    projection = sum(each.nbytes for each in workload.model.input_proj.parameters())  # type: ignore[union-attr]
    images, features = 2 * 3 * 64 * 96 * FLOAT, 2 * 256 * 2 * 3 * FLOAT
    assert work["backbone"].minimum_bytes == weights + projection + images + features


def test_optimizer_of_a_real_step() -> None:
    """Weight, gradient and two moments in and out: what clips the gradient writes it."""
    workload = build_workload(replace(OPTIONS, model="detr_tiny"))
    workload.run()
    nbytes = sum(each.nbytes for each in workload.model.parameters() if each.requires_grad)
    assert count_work(workload.run)["optimizer"].minimum_bytes == pytest.approx(8 * nbytes, rel=0.01)


def test_a_compiled_model_is_counted_uncompiled() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(8, 5)
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    assert flop_of(lambda: compiled(x)) == PRODUCT
    compiled(x)
