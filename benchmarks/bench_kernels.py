"""Each kernel against its plain form and against the compiled plain form: `pytest benchmarks/ --benchmark-only`.

Forward and, where there is one, backward, at the shapes of DETR-R50. Nothing is timed before the kernel is as close to
float64 as plain torch is; the error stands in `extra_info`. What is timed is a call as eager code makes it, with the
host's work for it: of the smallest kernels that is most of it, and `bench_forms.py` is what decides. Without a GPU the
plain forms alone are timed, at one image: Triton's interpreter tests numbers, not speed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import detr_kernels
import pytest
import torch
from detr_profiling.closeness import assert_same_function
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGES = 16 if DEVICE.type == "cuda" else 1
QUERIES, TARGETS, CLASSES, LAYERS, DIM, HEADS, TOKENS = 100, 20, 91, 6, 256, 8, 25 * 34
FLOORS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def boxes(*shape: int) -> Tensor:
    return torch.rand(*shape, 4, device=DEVICE) * 0.5 + 0.2


@dataclass(frozen=True)
class Case:
    """A kernel, called as `call(*inputs, backend=...)`, with what it is called with."""

    call: Callable[..., Any]
    make: Callable[[torch.dtype], Sequence[Any]]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    plain: str = "ref"
    """The name of the form it is compared with."""
    differentiable: int = 99
    """How many of the first inputs get a gradient, of those that have one."""


def convolution(channels: int, out_channels: int, height: int, width: int, kernel_size: int = 1) -> Case:
    """As in a bottleneck, its weight and input learning, its bias a frozen norm's: with a residual where it widens."""

    def make(dtype: torch.dtype) -> Sequence[Any]:
        x = noise(IMAGES, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        weight = noise(out_channels, channels, kernel_size, kernel_size, dtype=dtype) / channels**0.5
        residual = noise(IMAGES, out_channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        return x, weight, residual, noise(out_channels)

    def call(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor, backend: str) -> Tensor:
        added = residual if out_channels > channels else None
        return detr_kernels.conv_bias_act(
            x,
            weight,
            bias,
            added,
            padding=kernel_size // 2,
            backend=backend,  # type: ignore[arg-type]
        )

    return Case(call, make, differentiable=3)


def attention(queries: int, form: str) -> Case:
    def make(dtype: torch.dtype) -> Sequence[Any]:
        q, k, v = (noise(IMAGES * n, HEADS, DIM // HEADS, dtype=dtype) for n in (queries, TOKENS, TOKENS))
        offsets = (detr_kernels.Packing.uniform(IMAGES, n, DEVICE).offsets for n in (queries, TOKENS))
        return q, k, v, *offsets, queries, TOKENS

    def call(*inputs: Any, backend: str) -> Tensor:
        return detr_kernels.packed_attention(*inputs, backend=form if backend == "triton" else backend)  # type: ignore[arg-type]

    return Case(call, make, plain="sdpa")


def layer_norm(dtype: torch.dtype) -> Sequence[Any]:
    x, residual = (noise(IMAGES * TOKENS, DIM, dtype=each) for each in (dtype, torch.float32))
    return x, residual, noise(DIM), noise(DIM)


def cost(dtype: torch.dtype) -> Sequence[Any]:
    labels = torch.randint(CLASSES, (IMAGES, TARGETS), device=DEVICE)
    return noise(LAYERS, IMAGES, QUERIES, CLASSES + 1), boxes(LAYERS, IMAGES, QUERIES), labels, boxes(IMAGES, TARGETS)


def assignment(dtype: torch.dtype) -> Sequence[Any]:
    problems = LAYERS * IMAGES
    return torch.rand(problems, QUERIES, TARGETS, device=DEVICE), torch.randint(TARGETS + 1, (problems,), device=DEVICE)


def loss(dtype: torch.dtype) -> Sequence[Any]:
    logits, predicted, labels, wanted = cost(dtype)
    num_targets = torch.full((IMAGES,), TARGETS, device=DEVICE)
    query_of_target = torch.rand(LAYERS, IMAGES, QUERIES, device=DEVICE).argsort(-1)[..., :TARGETS]
    counts = num_targets.sum().float(), torch.tensor(500.0, device=DEVICE)
    return logits, predicted, labels, wanted, num_targets, query_of_target, *counts


def pixels(dtype: torch.dtype) -> Sequence[Any]:
    images = torch.randint(256, (IMAGES, 800, 1066, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
    sizes = torch.tensor([[800, 1066 - 8 * index] for index in range(IMAGES)], device=DEVICE)
    packed = detr_kernels.PackedImages.of_padded(images, sizes)
    return packed, 800, 1066, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype


CASES = {
    "conv1x1-64-256-200x267": convolution(64, 256, 200, 267),
    "conv1x1-512-128-100x134": convolution(512, 128, 100, 134),
    "conv1x1-1024-256-50x67": convolution(1024, 256, 50, 67),
    "conv1x1-512-2048-25x34": convolution(512, 2048, 25, 34),
    "conv3x3-128-128-100x134": convolution(128, 128, 100, 134, 3),
    "conv3x3-256-256-50x67": convolution(256, 256, 50, 67, 3),
    "self-attention": attention(TOKENS, "triton"),
    "cross-attention": attention(QUERIES, "triton"),
    "add-layer-norm": Case(detr_kernels.fused_add_layer_norm, layer_norm),
    "match-cost": Case(detr_kernels.match_cost, cost, (torch.float32,), differentiable=0),
    "assignment": Case(detr_kernels.batched_assignment, assignment, (torch.float32,), "scipy", differentiable=0),
    "set-loss": Case(detr_kernels.set_loss, loss, (torch.float32,), differentiable=2),
    "normalize-pad": Case(detr_kernels.normalize_pad, pixels, differentiable=0),
}
if DEVICE.type == "cuda":
    CASES["self-attention-xformers"] = attention(TOKENS, "xformers")
    CASES["cross-attention-xformers"] = attention(QUERIES, "xformers")


def total_cost(cost: Tensor, query_of_target: Tensor) -> Tensor:
    """(P,): of several optima, solvers may find different ones, but all cost the same."""
    chosen = cost.gather(1, query_of_target.clamp(min=0)[:, None])[:, 0]
    return torch.where(query_of_target >= 0, chosen, 0).double().sum(1)


def largest_error(case: Case, timed: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Any]) -> float:
    """How far `timed` is from float64. Raises AssertionError where that is more than plain torch's own error allows."""
    if case.plain == "scipy":
        found, expected = (total_cost(inputs[0], solve(*inputs)) for solve in (timed, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        return (found - expected).abs().max().item()
    leaves, rest = inputs[: case.differentiable], inputs[case.differentiable :]
    functions = [lambda *leaves, function=function: function(*leaves, *rest) for function in (timed, plain)]
    judged = assert_same_function(*functions, leaves, FLOORS[case.dtypes[0]])
    return max((each.error for each in judged), default=0.0)


@pytest.mark.parametrize("form", ["triton", "plain", "compiled"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{SHORT[dtype]}-b{IMAGES}")
        for name, case in CASES.items()
        for dtype in case.dtypes
    ],
)
def bench_kernel(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype, form: str) -> None:
    """Output and gradients of one call, as a training step makes them."""
    if form == "triton" and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter is for numbers, not for speed")
    case = CASES[name]
    if form == "compiled" and case.plain == "scipy":
        pytest.skip("SciPy does not compile")
    torch.manual_seed(0)
    inputs = case.make(dtype)

    def plain(*values: Any) -> Any:
        return case.call(*values, backend=case.plain)

    def fused(*values: Any) -> Any:
        return case.call(*values, backend="triton")

    timed = {"triton": fused, "plain": plain, "compiled": torch.compile(plain)}[form]
    benchmark.extra_info |= {"error": largest_error(case, timed, plain, inputs), "images": IMAGES}
    wanted = [
        x.requires_grad_() for x in inputs[: case.differentiable] if isinstance(x, Tensor) and x.is_floating_point()
    ]

    def run() -> None:
        result = timed(*inputs)
        outputs = [each for each in ([result] if isinstance(result, Tensor) else result) if each.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, wanted, [torch.ones_like(each) for each in outputs], allow_unused=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=50 if DEVICE.type == "cuda" else 5, warmup_rounds=5)
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
