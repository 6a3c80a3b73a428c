"""Attention in rows against float64, with masks, and where it differs from nn.MultiheadAttention on purpose."""

import pytest
import torch
from detr_kernels import Selection
from detr_profiling.comparison.closeness import assert_close
from torch import Tensor, nn

from detr_fast.model.attention import AttentionMask, MultiheadAttention

DIM, HEADS = 64, 4
BACKENDS = ["sdpa", "ref"]
# queries and keys: DETR's own, one key, and odd counts that fill no block of a fused kernel
SHAPES = [(100, 221), (7, 1), (33, 33)]
TOLERANCE = 3e-6
"""With one key the gradients of queries and keys are zero, and a fused backward leaves its summands' rounding."""


def make_attention(backend: str) -> MultiheadAttention:
    torch.manual_seed(0)
    attention = MultiheadAttention(DIM, HEADS).eval()
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    attention.use(Selection.named(attention=backend))
    return attention


def make_inputs(num_queries: int, num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of three images, and a mask that pads none, half, and all but one key of them."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(3, count, DIM) * 2 for count in (num_queries, num_keys, num_keys))
    place = torch.arange(num_keys)
    mask = torch.stack((place < 0, place >= (num_keys + 1) // 2, place != num_keys // 2))
    return query, key, value, mask


def run(attention: nn.Module, inputs: tuple[Tensor, ...], mask: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    if isinstance(attention, nn.MultiheadAttention):
        output, _ = attention(*inputs, key_padding_mask=mask)
    else:
        output = attention(*inputs, AttentionMask(mask))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
    grads = torch.autograd.grad((output * weight).sum(), [*inputs, *attention.parameters()])
    return [output, *grads]


def as_torch(attention: MultiheadAttention) -> nn.MultiheadAttention:
    other = nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    other.load_state_dict(attention.state_dict())
    return other


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_close_to_float64_as_torch(backend: str, shape: tuple[int, int], masked: bool) -> None:
    attention = make_attention(backend)
    *inputs, mask = make_inputs(*shape)
    chosen = mask if masked else None
    results = run(attention, tuple(inputs), chosen)
    eager = run(as_torch(attention), tuple(inputs), chosen)
    exact = run(as_torch(attention).double(), tuple(x.double() for x in inputs), chosen)
    for index, values in enumerate(zip(results, exact, eager, strict=True)):
        scale = values[1].abs().max().item()
        assert_close(*values, tolerance=TOLERANCE * max(1.0, scale), name=f"value {index}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_projection_for_queries_and_keys_that_are_one(backend: str) -> None:
    attention = make_attention(backend)
    query, _, value, mask = make_inputs(33, 33)
    torch.testing.assert_close(
        attention(query, query, value, AttentionMask(mask)),
        attention(query, query.clone(), value, AttentionMask(mask)),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_do_not_count(backend: str) -> None:
    attention = make_attention(backend)
    query, key, value, mask = make_inputs(5, 9)
    changed = [torch.where(mask[..., None], 1e4, x) for x in (key, value)]
    assert torch.equal(
        attention(query, key, value, AttentionMask(mask)), attention(query, *changed, AttentionMask(mask))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_padded_image_gives_zeros_and_finite_gradients(backend: str) -> None:
    attention = make_attention(backend)
    *inputs, mask = make_inputs(6, 8)
    mask[1] = True
    output, *grads = run(attention, tuple(inputs), mask)
    # zeros before the output projection: its bias is all that is left
    torch.testing.assert_close(output[1], attention.out_proj.bias.expand_as(output[1]), atol=0, rtol=0)
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[1] == 0).all() for grad in grads[:3])
    partly = mask.clone()
    partly[1] = False
    other_images = [0, 2]
    expected = attention(*inputs, AttentionMask(partly))[other_images]
    torch.testing.assert_close(output[other_images], expected, atol=1e-6, rtol=0)


def test_torch_gives_nan_there() -> None:
    """The difference on purpose, so that it is seen should torch change."""
    *inputs, mask = make_inputs(6, 8)
    mask[1] = True
    output, _ = as_torch(make_attention("ref"))(*inputs, key_padding_mask=mask)
    assert output[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_on_the_weights_and_only_in_training(backend: str) -> None:
    attention = make_attention(backend)
    attention.dropout = 0.5
    *inputs, mask = make_inputs(40, 50)
    plain = attention(*inputs, AttentionMask(mask))
    attention.train()
    torch.manual_seed(2)
    mean = torch.stack([attention(*inputs, AttentionMask(mask)) for _ in range(400)]).mean(0)
    assert not torch.equal(attention(*inputs, AttentionMask(mask)), plain)
    # the third image has one key left, dropped or doubled: the mean's spread is the plain value over sqrt(400)
    torch.testing.assert_close(mean, plain, atol=0.25 * plain.abs().max().item(), rtol=0)
