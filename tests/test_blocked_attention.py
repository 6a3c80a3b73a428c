"""Attention a few heads at a time, and the dropout it draws: exact for the mask that was drawn, which is fair."""

import math

import pytest
import torch
from detr_kernels import apply_dropout, relu_dropout
from detr_kernels.attention.blocked import backward_op, blocked_attention, forward_op
from detr_kernels.dropout.pcg64 import Dropper, threshold_of
from detr_profiling.comparison.closeness import assert_close
from torch import Tensor

from tests.kernel_inputs import TOLERANCES, TWO_DTYPES

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(2, 4, 33, 33), (2, 4, 10, 57), (1, 2, 7, 1)]
"""Images, heads, queries, keys: self- and cross-attention, and one key alone."""
EMPTY = [(0, 2, 3, 4), (1, 2, 0, 4)]
"""No image, no query."""
WIDTH = 16


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    images, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(images, count, heads, WIDTH) for count in (queries, keys, keys)]
    return tuple(torch.randn(size, generator=generator).transpose(1, 2).to(dtype) for size in sizes)  # type: ignore[return-value]


def padding_of(shape: tuple[int, ...]) -> Tensor:
    """The first image's keys are all attended to, of the second the first two thirds."""
    attended = torch.ones(shape[0], 1, 1, shape[3], dtype=torch.bool)
    attended[1:, ..., math.ceil(shape[3] * 2 / 3) :] = False
    return attended


def plain(q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None, keep: Tensor, p: float) -> Tensor:
    """As torch's plain form computes it, with dropout's mask given."""
    scores = (q * math.sqrt(1 / WIDTH)) @ k.transpose(-2, -1)
    if attended is not None:
        scores = scores.masked_fill(~attended, float("-inf"))
    return (scores.softmax(-1) * keep.view(scores.shape).to(q.dtype) / (1 - p)) @ v


def with_gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weighting).sum(), inputs)]


@pytest.mark.parametrize("together", [1, 3, 1000], ids="{} heads at a time".format)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.3, 0.0])
def test_as_exact_as_eager_with_the_same_mask(
    p: float, shape: tuple[int, ...], dtype: torch.dtype, masked: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = shape[2] * shape[3] * dtype.itemsize
    monkeypatch.setattr("detr_kernels.attention.blocked.CACHED_BYTES", together * weights)
    drawn: list[Tensor] = []
    drop = Dropper.drop

    def draw(self: Dropper, x: Tensor, out: Tensor) -> Tensor:
        drawn.append(drop(self, torch.ones_like(x), torch.empty_like(x)))
        return torch.mul(x, drawn[-1], out=out)

    monkeypatch.setattr(Dropper, "drop", draw)
    attended = padding_of(shape) if masked else None
    inputs = tuple(x.requires_grad_() for x in make_inputs(shape, dtype))
    found = with_gradients(blocked_attention(*inputs, attended, p), inputs)
    keep = torch.cat(drawn) if p else torch.ones(shape)
    assert len(drawn) == (-(-shape[0] * shape[1] // together) if p else 0)
    eager = with_gradients(plain(*inputs, attended, keep, p), inputs)
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    oracle = with_gradients(plain(*doubles, attended, keep, p), doubles)
    for name, *values in zip(("out", "dq", "dk", "dv"), found, oracle, eager, strict=True):
        assert_close(*values, TOLERANCES[dtype] * max(1.0, values[1].abs().max().item()), name)


def test_an_image_that_attends_to_nothing_gives_zeros() -> None:
    inputs = tuple(x.requires_grad_() for x in make_inputs(SHAPES[0], torch.float32))
    attended = torch.ones(2, 1, 1, 33, dtype=torch.bool)
    attended[1] = False
    out, *grads = with_gradients(blocked_attention(*inputs, attended, 0.1), inputs)
    assert out[0].abs().sum() > 0 and out[1].abs().sum() == 0
    assert all(grad.isfinite().all() and grad[1].abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    inputs = tuple(x.requires_grad_() for x in make_inputs(shape, torch.float32))
    out, *grads = with_gradients(blocked_attention(*inputs, None, 0.0), inputs)
    assert out.shape == inputs[0].shape and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("p", "count"), [(0.1, 2), (0.0, 1)])
def test_tensors_of_the_weights_size_are_kept_for_training_alone(p: float, count: int) -> None:
    inputs = tuple(x.requires_grad_() for x in make_inputs((1, 2, 40, 50), torch.float32))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        torch.manual_seed(0)
        trained = blocked_attention(*inputs, None, p)
    assert [tuple(x.shape) for x in saved if x.numel() >= 2 * 40 * 50] == [(2, 40, 50)] * count
    flat = [x.detach()[0] for x in inputs]
    torch.manual_seed(0)
    out, *weights = forward_op(*flat, None, p, False)
    assert torch.equal(out, trained[0].detach()) and [len(each) for each in weights] == [0, 0]


def test_operators_are_registered_as_torch_asks() -> None:
    q, k, v = (x.flatten(0, 1).detach().requires_grad_() for x in make_inputs(SHAPES[1], torch.float32))
    padded = ~padding_of(SHAPES[1]).expand(-1, 4, -1, -1).flatten(0, 1)
    hidden = torch.zeros(padded.shape).masked_fill(padded, float("-inf"))
    # what is drawn differs from run to run, so the mask is not compared
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (q, k, v, hidden, 0.1), test_utils=utils)
    _, weights, dropped = forward_op(q, k, v, hidden, 0.1)
    detached = [x.detach() for x in (q, k, v, weights, dropped)]
    torch.library.opcheck(backward_op, (torch.ones_like(detached[0]), *detached, 0.1))
    torch.library.opcheck(forward_op, (q, k, v, None, 0.1, False), test_utils=utils)
    torch.library.opcheck(forward_op, (q, k, v, hidden, 0.0))


def test_compiles_without_a_graph_break() -> None:
    inputs = tuple(x.requires_grad_() for x in make_inputs(SHAPES[1], torch.float32))
    function = lambda q, k, v: apply_dropout(blocked_attention(q, k, v, None, 0.1), 0.1, True) + 1  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for each in (function, compiled):
        torch.manual_seed(0)
        results.append(with_gradients(each(*inputs), inputs))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)


def drawn_mask(p: float, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 where an entry is kept."""
    return Dropper(p).drop(torch.ones(size, dtype=dtype), torch.empty(size, dtype=dtype))


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.4981, 0.5, 0.9, 0.99])
def test_of_all_numbers_a_part_p_is_dropped(p: float, dtype: torch.dtype) -> None:
    """Each of the 65536 numbers once, at every place of a vector."""
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    for first in (0, 1, 7, 15, 31):  # neither part fills whole vectors
        kept = [
            torch.ops.aten.threshold_backward(torch.ones(len(seen), dtype=dtype), seen, threshold_of(p))
            for seen in (numbers[:first], numbers[first:])
        ]
        assert abs((torch.cat(kept) == 0).sum().item() - p * 2**16) <= 1


def test_what_is_kept_is_not_changed() -> None:
    x = torch.randn(40, 51).bfloat16()
    torch.manual_seed(0)
    mask = drawn_mask(0.3, 40, 51, dtype=torch.bfloat16)
    torch.manual_seed(0)
    assert torch.equal(Dropper(0.3).drop(x, torch.empty_like(x)), x * mask)
    torch.manual_seed(0)
    assert torch.equal(Dropper(0.3).drop(x, x), x * mask)


@pytest.mark.parametrize("dtype", TWO_DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_entry_is_kept_with_the_same_probability_and_independently(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keep = torch.stack([drawn_mask(p, 400, 51, dtype=dtype) for _ in range(50)]).double()
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    deviation = math.sqrt(p * (1 - p))
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation / math.sqrt(keep.numel())
    assert (keep.mean((0, 1)) - (1 - p)).abs().max() < 5 * deviation / math.sqrt(50 * 400)
    centred = (keep - (1 - p)) / deviation
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2), centred.roll(4, 2), centred.roll(8, 2)):
        assert abs((centred * other).mean().item()) < 5 / math.sqrt(keep.numel())


def test_the_draw_follows_torchs_seed_and_is_new_each_time() -> None:
    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [drawn_mask(0.5, 1000) for _ in range(2)]

    (first, second), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", TWO_DTYPES)
def test_dropout_scales_what_it_keeps_and_passes_the_same_back(dtype: torch.dtype) -> None:
    x = torch.full((500, 7), 3.0, dtype=dtype, requires_grad=True)
    y = apply_dropout(x, 0.25, True)
    kept = y != 0
    assert 0.7 < kept.double().mean() < 0.8 and (y[kept] == 4).all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, kept.to(dtype) * torch.tensor(4 / 3).to(dtype))


@pytest.mark.parametrize("dtype", TWO_DTYPES)
def test_dropout_after_a_relu_in_one_pass(dtype: torch.dtype) -> None:
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = relu_dropout(x, 0.25, True)
    kept = y != 0
    assert 0.7 < kept[x > 0].double().mean() < 0.8 and not kept[x <= 0].any()
    torch.testing.assert_close(
        y, torch.where(kept, x / 0.75, 0), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, kept.to(dtype) * torch.tensor(4 / 3).to(dtype))
    assert torch.equal(relu_dropout(x, 0.25, False), x.relu())


def test_a_longer_draw_than_one_piece_is_as_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_kernels.dropout.pcg64.DRAWN", 32)
    keep = drawn_mask(0.5, 33 * 7, 10)
    assert set(keep.unique().tolist()) == {0.0, 1.0} and 0.45 < keep.mean() < 0.55
    assert not torch.equal(keep[:3].flatten()[:30], keep.flatten()[32:62])


def test_dropout_is_for_training() -> None:
    x = torch.randn(30, 7)
    assert apply_dropout(x, 0.5, False) is x or torch.equal(apply_dropout(x, 0.5, False), x)
    assert torch.equal(apply_dropout(x, 0.0, True), x)
