"""Each kernel against its reference and against the compiled reference.

Run it by `pytest benchmarks/bench_kernels.py --benchmark-only`.

Forward and, where there is one, backward, at the shapes of DETR-R50. Nothing is timed before the kernel is as close to
float64 as plain torch is; what draws dropout in training is judged without it, and timed with it. What is timed is a
call as eager code makes it, many issued back to back, and on a GPU also its CUDA graph: of the smallest kernels the
host's work for a call takes longer than the device's, and a captured step does not pay it. `bench_backends.py` and the
ladder decide. Images have one size here: with padding SDPA gets a mask, and takes longer. Without a GPU those of the
CPU are timed, and of the others the references alone, at one image: Triton's interpreter tests numbers, not speed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import detr_kernels
import torch
from detr_profiling.comparison.closeness import Closeness, assert_close, in_dtype, outputs_and_gradients
from detr_profiling.comparison.judgement import off_scale
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clock import DEVICE, Size, Verdict, time_case

ON_GPU = DEVICE.type == "cuda"
SIZES: dict[Size, tuple[int, int, int]] = (
    {"small": (16, 800, 1066), "full": (16, 800, 1066)} if ON_GPU else {"small": (1, 320, 427), "full": (1, 800, 1066)}
)
"""Images, their height and width in pixels."""
QUERIES, TARGETS, CLASSES, LAYERS, DIM, HEADS = 100, 20, 91, 6, 256, 8
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Tolerances relative to the largest magnitude: the error of another order of summation, or of one rounding to bf16."""
SCALE_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
P = 0.1
"""Dropout's probability."""


@dataclass(frozen=True)
class Kernel:
    """Called as `call(*make(dtype), backend=...)`."""

    operation: str
    """In the registry, whose backends are timed where they run."""
    call: Callable[..., Any]
    make: Callable[[torch.dtype], Sequence[Any]]
    size: str
    """Input size: HEIGHTxWIDTH in pixels, or the two sides of a matrix."""
    dtype: torch.dtype = torch.bfloat16
    plain: str = ""
    """The backend that the others are compared with; "": the operation's reference."""
    differentiable: int = 99
    """How many of the first inputs get a gradient, of those that have one."""
    draws: bool = False
    """Its numbers are random: means are compared."""
    timed: Callable[..., Any] | None = None
    """The call that is timed, where that draws dropout, whose result cannot be judged. None: `call`."""

    @property
    def baseline(self) -> str:
        return self.plain or detr_kernels.OPERATIONS[self.operation].reference

    def backends(self) -> list[str]:
        """List those that run here, but for the baseline, the plain reference and, on a CPU, Triton's interpreter."""
        operation = detr_kernels.OPERATIONS[self.operation]
        facts = detr_kernels.Facts(DEVICE, self.dtype, training=True, dropout=P if self.draws else 0.0)
        without = {self.baseline, operation.reference, *(() if ON_GPU else ("triton",))}
        return [name for name in operation.names if name not in without and operation.why_not(name, facts) is None]


@dataclass(frozen=True)
class KernelCase:
    """A kernel on one of its backends, or the plain one, or that compiled; each but the last also captured."""

    kernel_name: str
    kernel: Kernel
    backend: str
    images: int
    group: str

    @property
    def name(self) -> str:
        return f"{self.kernel_name}-{self.backend}"

    @property
    def size(self) -> str:
        return self.kernel.size

    @property
    def precision(self) -> str:
        return PRECISIONS[self.kernel.dtype]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def random_boxes(*shape: int) -> Tensor:
    return torch.rand(*shape, 4, device=DEVICE) * 0.5 + 0.2


def convolution(images: int, channels: int, out_channels: int, height: int, width: int, kernel_size: int) -> Kernel:
    """Describe one as in a bottleneck, whose weight and input learn and whose bias is a frozen norm's.

    Where it widens it has a residual.
    """

    def make(dtype: torch.dtype) -> Sequence[Any]:
        x = noise(images, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        weight = noise(out_channels, channels, kernel_size, kernel_size, dtype=dtype) / channels**0.5
        residual = noise(images, out_channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        return x, weight, residual, noise(out_channels)

    def call(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor, backend: Any) -> Tensor:
        added = residual if out_channels > channels else None
        return detr_kernels.conv_bias_act(x, weight, bias, added, padding=kernel_size // 2, backend=backend)

    return Kernel("convolution", call, make, f"{height}x{width}", differentiable=3)


def attention(images: int, queries: int, tokens: int) -> Kernel:
    def make(dtype: torch.dtype) -> Sequence[Any]:
        q, k, v = (noise(images * n, HEADS, DIM // HEADS, dtype=dtype) for n in (queries, tokens, tokens))
        cu_seqlens = (detr_kernels.Packing.uniform(images, n, DEVICE).cu_seqlens for n in (queries, tokens))
        return q, k, v, *cu_seqlens, queries, tokens

    def call(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, backend: Any, p: float = 0.0) -> Tensor:
        q_offsets, k_offsets, longest_q, longest_k = lengths
        if backend == "sdpa":  # as the model calls it: each image's tokens in rows of their own
            q, k, v = (x.unflatten(0, (images, -1)).transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(0, 1)
        return detr_kernels.packed_attention(q, k, v, q_offsets, k_offsets, longest_q, longest_k, p, p > 0, backend)

    return Kernel("attention", call, make, f"{queries}x{tokens}", plain="sdpa", timed=partial(call, p=P))


def layer_norm(images: int, tokens: int) -> Kernel:
    def make(dtype: torch.dtype) -> Sequence[Any]:
        x, residual = (noise(images * tokens, DIM, dtype=each) for each in (dtype, torch.float32))
        return x, residual, noise(DIM), noise(DIM)

    timed = partial(detr_kernels.fused_add_layer_norm, dropout=P, training=True)
    return Kernel("layer_norm", detr_kernels.fused_add_layer_norm, make, f"{tokens}x{DIM}", timed=timed)


def residual_stage(images: int, channels: int, height: int, width: int) -> Kernel:
    """Describe layer2's first two blocks, with weights that keep the scale of what they see."""
    middle, outputs = channels // 2, 2 * channels
    first = (middle, channels, 1), (middle, middle, 3), (outputs, middle, 1), (outputs, channels, 1)
    shapes = (*first, (middle, outputs, 1), *first[1:3])

    def make(dtype: torch.dtype) -> Sequence[Any]:
        x = noise(images, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        weights = [noise(n, c, side, side, dtype=dtype) / (c * side**2) ** 0.5 for n, c, side in shapes]
        return x, *weights, [noise(n) for n, _, _ in shapes]

    def call(x: Tensor, *rest: Any, backend: str) -> Tensor:
        *weights, biases = rest
        return detr_kernels.residual_stage(x, weights, biases, 2, [1, 1], backend)

    return Kernel("residual_stage", call, make, f"{height}x{width}", differentiable=len(shapes) + 1)


def depthwise(images: int, channels: int, height: int, width: int) -> Kernel:
    """Describe a 5x5 of EfficientNet-lite0, whose channels at stride 16 are 672."""

    def make(dtype: torch.dtype) -> Sequence[Any]:
        x = noise(images, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
        return x, noise(channels, 1, 5, 5, dtype=dtype) / 5, noise(channels, dtype=dtype)

    call = partial(detr_kernels.depthwise_conv, padding=2)
    return Kernel("depthwise_convolution", call, make, f"{height}x{width}", dtype=torch.float32)


def dropout(images: int, tokens: int) -> Kernel:
    def call(x: Tensor, backend: str) -> Tensor:
        return detr_kernels.apply_dropout(x, P, True, backend)

    def make(dtype: torch.dtype) -> Sequence[Any]:
        return [torch.ones(images * tokens, 8 * DIM, dtype=dtype)]

    return Kernel("dropout", call, make, f"{tokens}x{8 * DIM}", draws=True)


def dropout_attention(images: int, tokens: int) -> Kernel:
    """Take values that are one, so that what comes out is dropout's mean."""

    def make(dtype: torch.dtype) -> Sequence[Any]:
        q, k = (noise(images, HEADS, tokens, DIM // HEADS, dtype=dtype) for _ in range(2))
        return q, k, torch.ones_like(q)

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return detr_kernels.padded_attention(q, k, v, None, P, True, backend)

    return Kernel("attention", call, make, f"{tokens}x{tokens}", plain="sdpa", draws=True)


def cost_inputs(images: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(CLASSES, (images, TARGETS), device=DEVICE)
    logits, predicted = noise(LAYERS, images, QUERIES, CLASSES + 1), random_boxes(LAYERS, images, QUERIES)
    return logits, predicted, labels, random_boxes(images, TARGETS)


def set_kernels(images: int) -> dict[str, Kernel]:
    """Describe those of matching and loss, on all layers at once."""
    size, problems = f"{QUERIES}x{TARGETS}", LAYERS * images

    def assignment(dtype: torch.dtype) -> Sequence[Any]:
        counts = torch.randint(TARGETS + 1, (problems,), device=DEVICE)
        return torch.rand(problems, QUERIES, TARGETS, device=DEVICE), counts

    def loss(dtype: torch.dtype) -> Sequence[Any]:
        num_targets = torch.full((images,), TARGETS, device=DEVICE)
        query_of_target = torch.rand(LAYERS, images, QUERIES, device=DEVICE).argsort(-1)[..., :TARGETS]
        counts = num_targets.sum().float(), torch.tensor(500.0, device=DEVICE)
        return *cost_inputs(images), num_targets, query_of_target, *counts

    fp32 = torch.float32
    return {
        "match-cost": Kernel(
            "match_cost", detr_kernels.match_cost, lambda _: cost_inputs(images), size, fp32, differentiable=0
        ),
        "assignment": Kernel("assignment", detr_kernels.batched_assignment, assignment, size, fp32, differentiable=0),
        "set-loss": Kernel("set_loss", detr_kernels.set_loss, loss, size, fp32, differentiable=2),
    }


def pixels(images: int, height: int, width: int) -> Kernel:
    def make(dtype: torch.dtype) -> Sequence[Any]:
        photographs = [torch.randint(256, (480, 640, 3), dtype=torch.uint8) for _ in range(images)]
        sizes = [(height, width - 8 * index) for index in range(images)]
        packed = detr_kernels.PackedImages.from_list(photographs, sizes).to(DEVICE)
        return packed, height, width, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype

    return Kernel("preprocessing", detr_kernels.resize_normalize_pad, make, f"{height}x{width}", differentiable=0)


def make_kernels(images: int, height: int, width: int) -> dict[str, Kernel]:
    """Describe every kernel at the shapes that it has in a step on such images."""
    at = {stride: (-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)}
    tokens = at[32][0] * at[32][1]
    kernels = {
        "conv1x1-64-256": convolution(images, 64, 256, *at[4], 1),
        "conv1x1-512-128": convolution(images, 512, 128, *at[8], 1),
        "conv1x1-1024-256": convolution(images, 1024, 256, *at[16], 1),
        "conv1x1-512-2048": convolution(images, 512, 2048, *at[32], 1),
        "conv3x3-128-128": convolution(images, 128, 128, *at[8], 3),
        "conv3x3-256-256": convolution(images, 256, 256, *at[16], 3),
        "self-attention": attention(images, tokens, tokens),
        "cross-attention": attention(images, QUERIES, tokens),
        "add-layer-norm": layer_norm(images, tokens),
        **set_kernels(images),
        "resize-normalize-pad": pixels(images, height, width),
    }
    if not ON_GPU:
        kernels["residual-stage"] = residual_stage(images, 256, *at[4])
        kernels["depthwise-conv5x5"] = depthwise(images, 672, *at[16])
        kernels["dropout"] = dropout(images, tokens)
        kernels["dropout-attention"] = dropout_attention(images, tokens)
    return kernels


def cases(size: Size) -> Iterator[KernelCase]:
    """Yield each kernel with every backend that runs.

    SciPy does not compile, and compiling for a CPU takes longer than all else here.
    """
    images, height, width = SIZES[size]
    for name, kernel in make_kernels(images, height, width).items():
        compiled = (ON_GPU or size == "full") and kernel.baseline != "scipy"
        backends = [*kernel.backends(), "plain"]
        on_device = backends if ON_GPU and kernel.baseline != "scipy" else kernel.backends() if ON_GPU else []
        replayed = [f"{backend}{CAPTURED}" for backend in on_device]
        for backend in (*backends, *(["compiled"] if compiled else []), *replayed):
            yield KernelCase(name, kernel, backend, images, name if len(backends) > 1 else "kernels, plain alone")


CAPTURED = "-captured"
"""The end of a case's name."""


def total_cost(cost: Tensor, query_of_target: Tensor) -> Tensor:
    """Return the cost of each matching, (P,) float64: solvers may find different optima, but all cost the same."""
    chosen = cost.gather(1, query_of_target.clamp(min=0)[:, None])[:, 0]
    return torch.where(query_of_target >= 0, chosen, 0).double().sum(1)


def judge_assignment(found: Tensor, expected: Tensor) -> Verdict:
    """Compare total costs (P,) with SciPy's."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    return Verdict("total cost", (found - expected).abs().max().item(), 1e-5 * expected.abs().max().item())


def judge_dropout(of_ones: Tensor, numbers_a_row: int) -> Verdict:
    """Hold the mean of ones to one, within ten deviations of so many independent numbers, whatever is drawn."""
    allowed = 10 * (P / (1 - P) / (of_ones[..., 0].numel() * numbers_a_row)) ** 0.5
    error = abs(of_ones.double().mean().item() - 1)
    assert error <= allowed, f"the mean of ones is off by {error:.3g}, allowed {allowed:.3g}"
    return Verdict("mean of ones", error, allowed)


def judge(kernel: Kernel, timed: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Any]) -> Verdict:
    """Raise AssertionError where `timed` is further from float64 than plain torch's own error allows."""
    if kernel.draws:
        return judge_dropout(timed(*inputs), inputs[0].shape[-2] if len(inputs) > 1 else inputs[0].shape[-1])
    if kernel.baseline == "scipy":
        return judge_assignment(*(total_cost(inputs[0], solve(*inputs)) for solve in (timed, plain)))
    count = kernel.differentiable or len(inputs)
    leaves, rest = inputs[:count], inputs[count:]
    with torch.set_grad_enabled(kernel.differentiable > 0):
        found, eager, exact = (
            outputs_and_gradients(lambda *leaves, function=function: function(*leaves, *rest), given)
            for function, given in ((timed, leaves), (plain, leaves), (plain, in_dtype(leaves, torch.float64)))
        )
    judged: dict[str, Closeness] = {}
    for index, values in enumerate(zip(found, exact, eager, strict=True)):
        if values[1].is_floating_point():
            assert values[0].dtype == values[2].dtype
            judged |= judge_value(f"value {index}", *values, TOLERANCES[kernel.dtype], SCALE_TOLERANCES[kernel.dtype])
    name = max(judged, key=lambda name: judged[name].error / judged[name].allowed)
    return Verdict(name, judged[name].error, judged[name].allowed)


def judge_value(
    name: str, found: Tensor, exact: Tensor, eager: Tensor, tolerance: float, scale_tolerance: float
) -> dict[str, Closeness]:
    """Judge the largest error, and how much too long a value is as a whole.

    In bf16 rounding hides 1 % in each number, but not in all of them. Gradients that cancel to nothing still carry
    their summands' rounding: no scale is less than 1.
    """
    judged = {name: assert_close(found, exact, eager, tolerance * max(1.0, exact.abs().max().item()), name)}
    if exact.any():
        name = f"scale of {name}"
        ours, plain = (off_scale(each, exact) for each in (found, eager))
        judged[name] = assert_close(ours, torch.zeros_like(ours), plain, scale_tolerance, name)
    return judged


def forward_and_backward(timed: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[Tensor]) -> None:
    result = timed(*inputs)
    outputs = [each for each in ([result] if isinstance(result, Tensor) else result) if each.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(each) for each in outputs], allow_unused=True)


def bench_kernel(benchmark: BenchmarkFixture, case: KernelCase) -> None:
    """Time output and gradients of one call, as a training step makes them."""
    kernel = case.kernel
    inputs = kernel.make(kernel.dtype)
    judged, timed = (called_by(call, kernel, case.backend) for call in (kernel.call, kernel.timed or kernel.call))
    leaves = inputs[: kernel.differentiable]
    wanted = [x.requires_grad_() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    began = time.perf_counter()
    forward_and_backward(timed, inputs, wanted)
    compile_s = time.perf_counter() - began if case.backend == "compiled" else None
    verdict = judge(kernel, judged, called_by(kernel.call, kernel, "plain"), inputs)
    run = partial(forward_and_backward, timed, inputs, wanted)
    time_case(benchmark, case, verdict, captured(run) if case.backend.endswith(CAPTURED) else run, compile_s=compile_s)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call that has run before as a CUDA graph, and return what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def called_by(call: Callable[..., Any], kernel: Kernel, name: str) -> Callable[..., Any]:
    """Give `call` the backend that `name` stands for, and compile it where that says so."""
    name = name.removesuffix(CAPTURED)
    chosen = partial(call, backend=kernel.baseline if name in ("plain", "compiled") else name)
    return torch.compile(chosen) if name == "compiled" else chosen
