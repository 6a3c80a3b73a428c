"""Each kernel against its plain form and against the compiled plain form: `pytest benchmarks/ --benchmark-only`.

Forward and, where there is one, backward, at the shapes of DETR-R50. Nothing is timed before the kernel is as close to
float64 as plain torch is; the error stands in `extra_info`. Without a GPU the plain forms alone are timed, at two
images: Triton's interpreter tests numbers, not speed.
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
IMAGES = 16 if DEVICE.type == "cuda" else 2
QUERIES, TARGETS, CLASSES, LAYERS, DIM, HEADS, TOKENS = 100, 20, 91, 6, 256, 8, 25 * 34
FLOORS = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


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


def convolution(channels: int, out_channels: int, height: int, width: int, kernel_size: int = 1) -> Case:
    def make(dtype: torch.dtype) -> Sequence[Any]:
        x = noise(IMAGES, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        weight = noise(out_channels, channels, kernel_size, kernel_size, dtype=dtype) / channels**0.5
        return x, weight, noise(out_channels)

    def call(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return detr_kernels.conv_bias_act(x, weight, bias, padding=kernel_size // 2, relu=False, backend=backend)  # type: ignore[arg-type]

    return Case(call, make)


def attention(queries: int, form: str) -> Case:
    def make(dtype: torch.dtype) -> Sequence[Any]:
        q, k, v = (noise(IMAGES * n, HEADS, DIM // HEADS, dtype=dtype) for n in (queries, TOKENS, TOKENS))
        q_offsets, k_offsets = (detr_kernels.uniform_offsets(IMAGES, n, DEVICE) for n in (queries, TOKENS))
        return q, k, v, q_offsets, k_offsets, queries, TOKENS

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
    "match-cost": Case(detr_kernels.match_cost, cost, (torch.float32,)),
    "assignment": Case(detr_kernels.batched_assignment, assignment, (torch.float32,), plain="scipy"),
    "set-loss": Case(detr_kernels.set_loss, loss, (torch.float32,)),
    "normalize-pad": Case(detr_kernels.normalize_pad, pixels),
}
if DEVICE.type == "cuda":
    CASES["self-attention-xformers"] = attention(TOKENS, "xformers")
    CASES["cross-attention-xformers"] = attention(QUERIES, "xformers")


@pytest.mark.parametrize("form", ["triton", "plain", "compiled"])
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes], ids=str
)
def bench_kernel(benchmark: BenchmarkFixture, name: str, dtype: torch.dtype, form: str) -> None:
    """Outputs and all gradients of one call."""
    if form == "triton" and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter is for numbers, not for speed")
    case = CASES[name]
    if form == "compiled" and case.plain == "scipy":
        pytest.skip("SciPy does not compile")
    torch.manual_seed(0)
    inputs = case.make(dtype)

    def fused(*values: Any) -> Any:
        return case.call(*values, backend="triton" if form == "triton" else case.plain)

    def plain(*values: Any) -> Any:
        return case.call(*values, backend=case.plain)

    timed = torch.compile(plain) if form == "compiled" else fused
    judged = assert_same_function(timed, plain, inputs, FLOORS[dtype])
    benchmark.extra_info |= {"error": max((each.error for each in judged), default=0.0), "images": IMAGES}

    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]

    def run() -> None:
        result = timed(*leaves)
        outputs = [each for each in ([result] if isinstance(result, Tensor) else result) if each.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, wanted, [torch.ones_like(each) for each in outputs], allow_unused=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=20 if DEVICE.type == "cuda" else 5, warmup_rounds=3)
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
