"""Every backend of every operation in the registry: the same values and gradients, one graph, sound operators."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from detr_kernels import (
    OPERATIONS,
    Backend,
    Facts,
    OneDNNConvolution,
    Operation,
    PackedImages,
    Packing,
    Selection,
    apply_dropout,
    batched_assignment,
    conv_bias_act,
    depthwise_conv,
    fused_add_layer_norm,
    match_cost,
    packed_attention,
    padded_attention,
    relu_dropout,
    residual_stage,
    resize_normalize_pad,
    set_loss,
)
from detr_kernels.attention.backends import ROWS
from detr_kernels.compile_ahead import recorded_launches
from detr_kernels.convolution.batch_norm import scale_weight, scale_weights
from detr_kernels.loss.set_loss import ClassLoss
from detr_kernels.registry import select
from detr_profiling.comparison.closeness import assert_close
from detr_profiling.limits.roofline import count_work
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests import kernel_inputs
from tests.kernel_inputs import seeded

DEVICE = torch.device(kernel_inputs.DEVICE)
RARELY = 1e-6
"""Probability of dropout that the backends which need some are given: with these seeds nothing is dropped."""
Row = tuple[Callable[..., Any], list[Tensor]]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)).to(DEVICE) - 0.5


def attention(backend: str) -> Row:
    """Two images, of 9 queries and 12 keys; packed where the backend takes them so."""
    q, k, v = uniform(2, 4, 9, 16), uniform(2, 4, 12, 16, seed=1), uniform(2, 4, 12, 16, seed=2)
    if backend in ROWS:
        return lambda q, k, v: padded_attention(q, k, v, None, RARELY, True, backend), [q, k, v]
    queries, keys = (Packing.uniform(2, count, DEVICE) for count in (9, 12))

    def packed(*tensors: Tensor) -> Tensor:
        rows = (x.transpose(1, 2).flatten(0, 1) for x in tensors)
        mixed = packed_attention(*rows, queries.cu_seqlens, keys.cu_seqlens, 9, 12, training=True, backend=backend)
        return mixed.unflatten(0, (2, 9)).transpose(1, 2)

    return packed, [q, k, v]


def dropout(backend: str) -> Row:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return apply_dropout(x, RARELY, True, backend), relu_dropout(x, RARELY, True, backend)

    return both, [uniform(5, 7)]


def frozen_batch_norm(backend: str) -> Row:
    """The part that differs: weights scaled, and rounded to bfloat16."""
    scale = uniform(6, seed=1) + 1

    def fold(weight: Tensor) -> Tensor:
        if backend == "foreach":
            return scale_weights([weight], [scale[:, None, None, None].expand_as(weight)], torch.bfloat16)[0].float()
        return scale_weight(weight, scale, torch.bfloat16).float()

    return fold, [uniform(6, 4, 3, 3)]


def stage_weights() -> tuple[list[Tensor], list[Tensor]]:
    """Of two blocks from 8 to 16 channels, 4 within."""
    shapes = [(4, 8, 1), (4, 4, 3), (16, 4, 1), (16, 8, 1), (4, 16, 1), (4, 4, 3), (16, 4, 1)]
    weights = [uniform(outputs, inputs, side, side, seed=inputs) for outputs, inputs, side in shapes]
    return weights, [uniform(weight.shape[0], seed=9) for weight in weights]


def stage(backend: str, blocks: int = 2) -> Row:
    weights, biases = (each[: 1 + 3 * blocks] for each in stage_weights())

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return residual_stage(x, weights, [each.to(x.dtype) for each in biases], 2, [1] * blocks, backend)

    return run, [uniform(2, 8, 6, 5), *weights]


def convolution(backend: str) -> Row:
    """A 3x3, and a 1x1 of stride 2 with a residual."""

    def both(x: Tensor, wide: Tensor, narrow: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        one = conv_bias_act(x, wide, bias, padding=1, backend=backend)
        return one, conv_bias_act(x, narrow, bias, residual, 2, backend=backend)

    tensors = uniform(2, 4, 9, 7), uniform(6, 4, 3, 3), uniform(6, 4, 1, 1, seed=1), uniform(6), uniform(2, 6, 5, 4)
    return both, list(tensors)


def depthwise_convolution(backend: str) -> Row:
    """A 5x5, and a 3x7 and a 3x3 of stride 2 without a bias."""

    def all_three(x: Tensor, bias: Tensor, *weights: Tensor) -> list[Tensor]:
        geometries = (bias, 1, 2), (None, 2, 1), (None, 2, 0)
        return [depthwise_conv(x, weight, *each, backend) for weight, each in zip(weights, geometries, strict=True)]

    weights = [uniform(6, 1, *size, seed=number) for number, size in enumerate([(5, 5), (3, 7), (3, 3)])]
    return all_three, [uniform(2, 6, 9, 8), uniform(6), *weights]


def packed_convolution(backend: str) -> Row:
    weight, bias = uniform(6, 4, 3, 3, seed=1), uniform(6, seed=2)
    packed = OneDNNConvolution(weight, bias, 2, 1, 1)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        if backend == "onednn":
            return packed(x.contiguous(memory_format=torch.channels_last), None, True)
        return conv_bias_act(x, weight.to(x.dtype), bias.to(x.dtype), None, 2, 1, backend="ref")

    return run, [uniform(2, 4, 9, 7)]


def predictions() -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Logits and boxes of two layers and images, labels and boxes of up to three targets."""
    boxes, target_boxes = uniform(2, 2, 5, 4, seed=1) * 0.4 + 0.5, uniform(2, 3, 4, seed=2) * 0.4 + 0.5
    return [uniform(2, 2, 5, 7) * 8, boxes], (torch.tensor([[1, 5, 0], [2, 2, 3]], device=DEVICE), target_boxes)


def losses(backend: str) -> Row:
    tensors, targets = predictions()
    counts = torch.tensor([3, 1], device=DEVICE)
    queries = torch.tensor([[[4, 0, 2], [1, -1, -1]], [[0, 1, 2], [3, -1, -1]]], device=DEVICE)
    sums = [torch.tensor(value, device=DEVICE) for value in (4.0, 5.5)]

    def both(*given: Tensor) -> Tensor:
        """The terms of softmax and of sigmoid scores."""
        given = (*given, *targets, counts, queries, *sums, 0.1, backend)
        return torch.stack([term for kind in get_args(ClassLoss) for term in set_loss(*given, kind)[:3]])

    return both, tensors


def costs(backend: str) -> Row:
    tensors, targets = predictions()

    def both(*given: Tensor) -> tuple[Tensor, ...]:
        """Compute it for softmax and for sigmoid scores."""
        return tuple(match_cost(*given, *targets, backend=backend, focal_alpha=alpha) for alpha in (None, 0.25))

    return both, tensors


def images(backend: str) -> Row:
    """One enlarged and mirrored, one as it is, then both recolored; the pixels are no input that learns."""
    pixels = [(uniform(*size, 3, seed=seed) + 0.5).mul(255).byte() for seed, size in enumerate([(6, 8), (5, 4)])]
    packed = PackedImages.from_list([each.cpu() for each in pixels], [(9, 12), (5, 4)], [True, False]).to(DEVICE)
    recolored = replace(packed, colors=uniform(2, 3, 4))

    def both() -> tuple[Tensor, ...]:
        statistics = (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)
        return tuple(resize_normalize_pad(each, 10, 12, *statistics, backend=backend) for each in (packed, recolored))

    return both, []


def by_backend(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Callable[[str], Row]:
    return lambda backend: (lambda *given: function(*given, backend=backend, **options), list(tensors))


ROWS_OF: dict[str, Callable[[str], Row]] = {
    "preprocessing": images,
    "frozen_batch_norm": frozen_batch_norm,
    "convolution": convolution,
    "residual_stage": stage,
    "packed_convolution": packed_convolution,
    "depthwise_convolution": depthwise_convolution,
    "attention": attention,
    "dropout": dropout,
    "layer_norm": by_backend(fused_add_layer_norm, uniform(3, 5, 16), uniform(3, 5, 16), uniform(16), uniform(16)),
    "match_cost": costs,
    "assignment": by_backend(batched_assignment, uniform(3, 6, 4), torch.tensor([4, 0, 2], device=DEVICE)),
    "set_loss": losses,
}
"""Operation -> a backend's function of tensors, and these. A new operation has its row here."""
TOLERANCES = {"preprocessing": 1 / 255 / 0.2, "frozen_batch_norm": 4e-3, "match_cost": 1e-6}
"""Absolute, where it is not 3e-6: a level of 255, a rounding to bfloat16."""
EVERY = [(name, backend.name) for name, operation in OPERATIONS.items() for backend in operation.backends]


def facts_of(name: str) -> Facts:
    return Facts(DEVICE, training=OPERATIONS[name].mode != "inference", dropout=RARELY, head_dim=16)


def row(name: str, backend: str) -> Row:
    """Skips, with the reason, where the backend cannot run."""
    if problem := OPERATIONS[name].why_not(backend, facts_of(name)):
        pytest.skip(problem)
    return ROWS_OF[name](backend)


def leaves(tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [each.to(dtype).requires_grad_() if each.is_floating_point() else each for each in tensors]


def values(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Results and, where they have any, the gradients of every input that learns."""
    torch.manual_seed(3)
    results = function(*tensors)
    results = [results] if isinstance(results, Tensor) else list(results)
    learning = [each for each in tensors if each.requires_grad]
    if not results[0].requires_grad:
        return results
    weighted = sum(
        (each * (1 + torch.arange(each.numel(), device=DEVICE).view(each.shape) % 3)).sum() for each in results
    )
    return [each.detach() for each in (*results, *torch.autograd.grad(weighted, learning))]


def assert_all_close(name: str, found: list[Tensor], exact: list[Tensor], eager: list[Tensor], least: float) -> None:
    """Each value as close to its own in float64 as the reference is, but for `least` of its largest magnitude."""
    for value, oracle, plain in zip(found, exact, eager, strict=True):
        assert value.dtype == plain.dtype
        if value.is_floating_point():
            assert_close(value, oracle, plain, least * max(1.0, oracle.abs().max().item()), name)
        else:
            assert torch.equal(value, oracle)


def in_float64(name: str) -> torch.dtype:
    """Its dtype, but for operations that compute in float32 whatever comes."""
    return torch.float32 if name in ("preprocessing", "assignment", "frozen_batch_norm") else torch.float64


each_backend = pytest.mark.parametrize(("name", "backend"), EVERY)


@pytest.mark.usefixtures("poisoned")
@each_backend
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_every_backend_computes_what_the_reference_does(name: str, backend: str, strided: bool) -> None:
    """Forward and every gradient; of memory in order, and of every second entry of a row."""
    function, tensors = row(name, backend)
    if strided:
        tensors = [each.repeat_interleave(2, -1)[..., ::2] for each in tensors]
    plain, _ = ROWS_OF[name](OPERATIONS[name].reference)
    exact = values(plain, leaves(tensors, in_float64(name)))
    found, eager = values(function, leaves(tensors)), values(plain, leaves(tensors))
    assert_all_close(name, found, exact, eager, TOLERANCES.get(name, 3e-6))


AUTOCAST = [
    each
    for each in EVERY
    if each[0] in ("convolution", "depthwise_convolution", "layer_norm", "match_cost", "set_loss")
]
"""Those that cast their own inputs; into the others come what was cast, or nothing that autocast knows."""


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "backend"), AUTOCAST)
def test_under_autocast_every_backend_has_the_references_dtypes_and_values(name: str, backend: str) -> None:
    function, tensors = row(name, backend)
    plain, _ = ROWS_OF[name](OPERATIONS[name].reference)
    exact = values(plain, leaves(tensors, torch.float64))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, eager = values(function, leaves(tensors)), values(plain, leaves(tensors))
    assert_all_close(name, found, exact, eager, kernel_inputs.TOLERANCES[torch.bfloat16])


@each_backend
def test_every_backend_counts_the_references_flop(name: str, backend: str) -> None:
    """Of both passes, by the shapes: what the report calls the model's work must not depend on what runs it."""
    function, tensors = row(name, backend)
    plain, _ = ROWS_OF[name](OPERATIONS[name].reference)
    count, expected = (
        sum(work.flop for work in count_work(lambda run=run: values(run, leaves(tensors))).values())
        for run in (function, plain)
    )
    assert count == expected
    assert (count > 0) == (name == "attention" or "convolution" in name or name == "residual_stage")


@each_backend
def test_every_backend_compiles_to_one_graph(name: str, backend: str) -> None:
    if (name, backend) == ("packed_convolution", "onednn"):
        pytest.skip("torch.compile packs weights by itself")
    function, tensors = row(name, backend)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(values(compiled, leaves(tensors)), values(function, leaves(tensors)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class OwnCalls(TorchDispatchMode):
    """Remembers the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "detr_kernels":
            self.calls[func.name()] = func, args, kwargs or {}
        return func(*args, **(kwargs or {}))


@each_backend
def test_every_operator_is_registered_as_torch_asks_and_belongs_to_its_operation(name: str, backend: str) -> None:
    function, tensors = row(name, backend)
    if name == "residual_stage":  # of two blocks opcheck takes twice as long
        function, tensors = stage(backend, blocks=1)
    with OwnCalls() as own:
        values(function, leaves(tensors))
    for operator, (called, args, kwargs) in own.calls.items():
        assert operator.removeprefix("detr_kernels::") in OPERATIONS[name].flop
        if OPDEFS[operator]._backward_fn is None:  # of no use to what learns, as of a backward pass
            args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        torch.library.opcheck(called, args, kwargs)


def test_the_registry_is_whole() -> None:
    assert OPERATIONS.keys() == ROWS_OF.keys()
    for operation in OPERATIONS.values():
        assert len(set(operation.names)) == len(operation.names) >= 2
        assert operation.why_not(operation.reference, Facts(torch.device("meta"), torch.float64)) is None
        assert ("triton" in operation.names) == (operation.specimens is not None)
        assert operation.specimens is None or recorded_launches(operation.specimens)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="these are a CPU's")
def test_only_a_gpus_backends_are_skipped_here() -> None:
    """A backend that refuses too much would be tested nowhere."""
    refused = {each for each in EVERY if OPERATIONS[each[0]].why_not(each[1], facts_of(each[0]))}
    assert refused == {("convolution", "cudnn"), ("frozen_batch_norm", "foreach"), ("attention", "xformers")}


CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TWO = Operation(
    "two_words",
    (
        Backend("fast", lambda facts: None if facts.training else "it is for training", reason="it is fast"),
        Backend("odd", only_by_name=lambda facts: "nobody measured it"),
        Backend("plain"),
    ),
)


def test_auto_takes_the_first_that_can_and_says_why() -> None:
    assert TWO.choose(Facts(CPU, training=True)) == ("fast", "it is fast")
    assert TWO.choose(Facts(CPU)) == ("plain", "not odd: nobody measured it")
    assert str(TWO.choose(Facts(CPU), "odd")) == "odd (asked for)"


def test_what_is_asked_for_runs_or_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"two words by fast: it is for training\. Or ask for auto\."):
        TWO.choose(Facts(CPU), "fast")
    with pytest.raises(ValueError, match="two words: backend must be auto, fast, odd, plain, not 'fats'"):
        TWO.choose(Facts(CPU), "fats")


def test_a_selection_of_both_modes() -> None:
    operations = {"two_words": TWO}
    auto = select(operations, Facts(CPU))
    assert [auto.backend("two_words", training) for training in (True, False)] == ["fast", "plain"]
    named = select(operations, Facts(CPU), {"two_words": "fast"})  # runs in training alone
    assert named.training["two_words"] == ("fast", "asked for") and named.backend("two_words") == "plain"
    measured = select(operations, Facts(CPU), measured={"two_words": ("odd", "measured here: 2 ms")})
    assert str(measured.training["two_words"]) == str(measured.inference["two_words"]) == "odd (measured here: 2 ms)"
    asked = select(operations, Facts(CPU), {"two_words": "plain"}, {"two_words": ("odd", "measured here")})
    assert asked.backend("two_words", training=True) == "plain"
    assert Selection().backend("two_words") == "auto"
    with pytest.raises(ValueError, match="three_words: no such operation; there are two_words"):
        select(operations, Facts(CPU), {"three_words": "fast"})


def test_a_gpu_is_guessed_without_asking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured: torch's own, but for what would wait for the device or saves launches for certain."""
    monkeypatch.setattr("detr_kernels.launch.INTERPRETED", False)
    guess = {name: operation.choose(Facts(CUDA, torch.bfloat16, True, 0.1)) for name, operation in OPERATIONS.items()}
    others = {"attention": "sdpa", "assignment": "triton", "frozen_batch_norm": "foreach"}
    assert {name: choice.backend for name, choice in guess.items() if choice.backend != "ref"} == others
    assert "nobody has measured it" in guess["set_loss"].reason and "would wait" in guess["assignment"].reason
