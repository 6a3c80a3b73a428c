"""Attention over packed tokens: every backend does what plain attention does image by image, ragged or empty."""

import math
from collections.abc import Callable

import pytest
import torch
from detr_kernels import packed_attention
from detr_kernels.attention.packing import images_of_rows
from detr_kernels.attention.triton_forward import triton_attention
from detr_profiling.comparison.closeness import assert_same_function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernel_inputs import DEVICE, TOLERANCES

pytestmark = pytest.mark.usefixtures("poisoned")

TAIL = 5

# Lengths of the images' queries and keys. Self-attention: several blocks and a ragged one, one token, none, one block.
# Cross-attention: DETR's 100 queries against several blocks, no keys at all, and less than a block; and no queries.
LENGTHS = {
    "self": ([70, 1, 0, 64], [70, 1, 0, 64]),
    "cross": ([100, 100, 0, 100], [130, 0, 9, 7]),
    "dropout": ([70, 20], [130, 9]),
}
BACKENDS: list[str] = ["ref", "sdpa", "triton"]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def lengths_of_qkv(name: str) -> list[list[int]]:
    q_lengths, k_lengths = LENGTHS[name]
    return [q_lengths, k_lengths, k_lengths]


def make_inputs(name: str, dim: int, dtype: torch.dtype, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [sum(lengths) + TAIL for lengths in lengths_of_qkv(name)]
    return [torch.randn(each, heads, dim, generator=generator).to(DEVICE, dtype) for each in rows]


def packed(name: str, backend: str, **options: float) -> Callable[..., Tensor]:
    """`packed_attention` over images of the lengths `name`."""
    bounds = [max(lengths) + 3 for lengths in LENGTHS[name]]
    places = [cu_seqlens(lengths) for lengths in LENGTHS[name]]
    return lambda q, k, v: packed_attention(q, k, v, *places, *bounds, backend=backend, **options)


def image_by_image(name: str) -> Callable[..., Tensor]:
    """The definition: softmax(q k^T / sqrt(d)) v of each image alone, zeros where there is nothing to attend to."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        images = [part.split([*lengths, TAIL]) for part, lengths in zip((q, k, v), lengths_of_qkv(name), strict=True)]
        out = []
        for q_, k_, v_ in zip(*(image[:-1] for image in images), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q_, k_) * (1 / math.sqrt(q.shape[-1]))
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_) if len(k_) else torch.zeros_like(q_))
        return torch.cat([*out, torch.zeros_like(images[0][-1])])

    return attend


@pytest.mark.parametrize("name", ["self", "cross"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_attention_within_each_image(backend: str, name: str) -> None:
    assert_same_function(packed(name, backend), image_by_image(name), make_inputs(name, 32, torch.float32), 2e-6)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(16, torch.float32), (64, torch.float32), (32, torch.bfloat16), (32, torch.float16)]
)
@pytest.mark.parametrize("name", ["self", "cross"])
def test_kernels_are_as_exact_as_eager(name: str, dim: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(name, dim, dtype, heads=1)
    assert_same_function(packed(name, "triton"), packed(name, "ref"), inputs, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_scores_of_a_thousand(dtype: torch.dtype) -> None:
    q, k, v = make_inputs("self", 32, dtype, heads=1)
    q, k = (x * 15 for x in (q, k))
    assert 900 < (q[:70, 0] @ k[:70, 0].T).abs().max() / math.sqrt(32) < 2000
    # the weights are found again from the logarithm of their sum, whose last place is 1e-4 here: half of it
    floor = max(TOLERANCES[dtype], 5e-5)
    assert_same_function(packed("self", "triton"), packed("self", "ref"), [q, k, v], floor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_one_projection(backend: str) -> None:
    projected = torch.cat(make_inputs("self", 32, torch.float32), 1).flatten(1)
    split = lambda x: [part.unflatten(1, (2, 32)) for part in x.chunk(3, 1)]  # noqa: E731
    assert not split(projected)[0].is_contiguous()
    attend = packed("self", backend)
    assert_same_function(lambda x: attend(*split(x)), lambda x: image_by_image("self")(*split(x)), [projected], 2e-6)


def test_heads_that_do_not_lie_side_by_side() -> None:
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in make_inputs("self", 16, torch.float32)]
    assert inputs[0].stride(1) != 16
    assert_same_function(packed("self", "triton"), packed("self", "ref"), inputs, 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_padding_belong_to_no_image(backend: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs("cross", 16, torch.float32, heads=1)]
    spoilt = [torch.cat([x[:-TAIL], torch.full_like(x[-TAIL:], float("nan"))]) for x in inputs]
    out = packed("cross", backend)(*spoilt)
    assert (out[-TAIL:] == 0).all()
    assert torch.equal(out, packed("cross", backend)(*inputs))
    gradients = torch.autograd.grad(out.sum(), spoilt)
    assert all((gradient[-TAIL:] == 0).all() and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to(backend: str) -> None:
    none, some = cu_seqlens([0, 0]), cu_seqlens([2, 1])
    for q_rows, k_rows, places in (
        (3, 4, (some, none)),
        (3, 4, (none, some)),
        (0, 4, (none, some)),
        (3, 0, (some, none)),
    ):
        q = torch.randn(q_rows, 1, 16, device=DEVICE, requires_grad=True)
        k, v = (torch.randn(k_rows, 1, 16, device=DEVICE, requires_grad=True) for _ in range(2))
        for bounds in ((2, 2), (0, 0)):
            out = packed_attention(q, k, v, *places, *bounds, backend=backend)
            gradients = torch.autograd.grad(out.sum(), (q, k, v), materialize_grads=True)
            assert out.shape == q.shape
            assert all((each == 0).all() for each in (out, *gradients))
    out = packed_attention(q, q, q, cu_seqlens([]), cu_seqlens([]), 2, 2, backend=backend)
    assert (out == 0).all() and out.shape == q.shape


def keep_mask(q: Tensor, k: Tensor, p: float, seed: int) -> Tensor:
    """Which weights (H, Mq, Mk) the kernels' forward pass keeps: those with which it adds rows of an identity."""
    columns = []
    for first in range(0, len(k), 64):
        v = torch.zeros(len(k), q.shape[1], 64, dtype=q.dtype, device=DEVICE)
        v[first : first + 64] = torch.eye(64, device=DEVICE)[: len(k) - first, None]
        torch.manual_seed(seed)
        columns.append(packed("dropout", "triton", dropout=p, training=True)(q, k, v) != 0)
    return torch.cat(columns, 2)[:, :, : len(k)].transpose(0, 1)


def test_dropouts_mask_is_the_same_in_all_passes() -> None:
    p, (q, k, v) = 0.3, make_inputs("dropout", 64, torch.float32)
    mask = keep_mask(q.bfloat16(), k.bfloat16(), p, 7)
    torch.manual_seed(7)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = packed("dropout", "triton", dropout=p, training=True)(*inputs)
    weighting = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weighting).sum(), inputs)
    images = [
        images_of_rows(cu_seqlens(lengths), len(x)) for lengths, x in zip(LENGTHS["dropout"], (q, k), strict=True)
    ]
    elsewhere = images[0][:, None] != images[1]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scores = torch.einsum("qhd,khd->hqk", *exact[:2]) / 8
    weights = scores.masked_fill(elsewhere, float("-inf")).softmax(-1)
    reference = torch.einsum("hqk,khd->qhd", torch.where(mask, weights / (1 - p), 0), exact[2])[:-TAIL]
    torch.testing.assert_close(out[:-TAIL].double(), reference, atol=3e-6, rtol=1e-6)
    reference_gradients = torch.autograd.grad((reference * weighting[:-TAIL]).sum(), exact)
    for gradient, reference in zip(gradients, reference_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), reference, atol=1e-5, rtol=1e-5)


def test_dropout_keeps_each_weight_with_the_same_probability_and_independently() -> None:
    p, (q, k, _) = 0.3, make_inputs("dropout", 64, torch.bfloat16)
    spread = math.sqrt(p * (1 - p))
    # of the first image (heads, queries, keys), in standard deviations
    once, again = ((keep_mask(q, k, p, seed)[:, :70, :130].double() - (1 - p)) / spread for seed in (7, 8))
    heads, queries, keys = once.shape
    assert once.mean().abs() < 4 / math.sqrt(once.numel())
    assert once.mean(1).abs().max() < 5 / math.sqrt(queries)
    assert once.mean(2).abs().max() < 5 / math.sqrt(keys)
    of_keys = torch.einsum("hqk,hql->kl", once, once) / (heads * queries)
    of_queries = torch.einsum("hqk,hrk->qr", once, once) / (heads * keys)
    assert of_keys.fill_diagonal_(0).abs().max() < 6 / math.sqrt(heads * queries)
    assert of_queries.fill_diagonal_(0).abs().max() < 6 / math.sqrt(heads * keys)
    assert (once[0] * once[1]).mean().abs() < 5 / math.sqrt(queries * keys)
    assert (once * again).mean().abs() < 5 / math.sqrt(once.numel())


def test_dropouts_mask_does_not_depend_on_the_dtypes_blocks() -> None:
    q, k, _ = make_inputs("dropout", 64, torch.float32, heads=1)
    assert torch.equal(keep_mask(q, k, 0.3, 7), keep_mask(q.bfloat16(), k.bfloat16(), 0.3, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_draws_anew_each_time_and_only_in_training(backend: str) -> None:
    inputs = make_inputs("self", 16, torch.float32, heads=1)
    once, again = (packed("self", backend, dropout=0.5, training=True)(*inputs) for _ in range(2))
    assert not torch.equal(once, again)
    assert torch.equal(packed("self", backend, dropout=0.5)(*inputs), packed("self", backend)(*inputs))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = make_inputs("self", 16, torch.float32, heads=1)
    places = cu_seqlens(LENGTHS["self"][0])
    with pytest.raises(ValueError, match=r"\(140, 1, 8\)"):
        packed_attention(q[..., :8], k, v, places, places, 70, 70)
    with pytest.raises(ValueError, match=r"\[\(5,\), \(4,\)\]"):
        packed_attention(q, k, v, places, places[1:], 70, 70)
    with pytest.raises(ValueError, match=r"int64"):
        packed_attention(q, k, v, places, places.long(), 70, 70)
    with pytest.raises(ValueError, match="less than 1, not 1"):
        packed_attention(q, k, v, places, places, 70, 70, dropout=1.0)
    with pytest.raises(RuntimeError, match="width 16, 32, 64, not 8"):
        packed_attention(*(x[..., :8] for x in (q, k, v)), places, places, 70, 70, backend="triton")


@pytest.mark.parametrize("backend", ["ref", "sdpa"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    attend, inputs = packed("self", backend), make_inputs("self", 16, torch.float32, heads=1)
    compiled = torch.compile(lambda *inputs: attend(*inputs).relu(), fullgraph=True, backend="aot_eager")
    assert_same_function(compiled, lambda *inputs: packed("self", "ref")(*inputs).relu(), inputs, 2e-6)


def test_nothing_is_read_on_the_host() -> None:
    with FakeTensorMode():  # has no values to read
        q, k = (torch.zeros(rows, 8, 32, dtype=torch.bfloat16, device="cuda") for rows in (1600, 13600))
        places = torch.zeros(17, dtype=torch.int32, device="cuda")
        for backend in ("sdpa", "ref"):
            out = packed_attention(q, k, k, places, places, 100, 850, 0.1, True, backend)
            assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "cuda")
        assert triton_attention(q, k, k, places, places, 100, 850, 0.1).shape == q.shape


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["self", "cross"])
def test_flash_attention_on_a_gpu_is_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(name, 32, dtype, heads=8)
    assert_same_function(packed(name, "xformers"), packed(name, "ref"), inputs, TOLERANCES[dtype])


@needs_gpu
@pytest.mark.parametrize("backend", ["xformers", "triton"])
def test_dropout_on_a_gpu_drops_the_same_in_both_passes(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in make_inputs("self", 32, torch.float16, heads=8))
    out = packed("self", backend, dropout=0.5, training=True)(q, k, v)
    weighting = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, weighting)
    products = (out.double() * weighting).sum(), (v.double() * dv).sum()  # equal, as the output is linear in v
    assert (products[0] - products[1]).abs() < 1e-2 * (out.double() * weighting).norm()


@needs_gpu
@pytest.mark.parametrize("backend", ["xformers", "triton"])
def test_a_captured_graph_serves_other_lengths(backend: str) -> None:
    q, k, v = make_inputs("cross", 32, torch.bfloat16, heads=8)
    places = [cu_seqlens(lengths) for lengths in LENGTHS["cross"]]
    attend = lambda backend: packed_attention(q, k, v, *places, 120, 140, backend=backend)  # noqa: E731
    attend(backend)  # compiles, and loads what is loaded once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(backend)
    for place, lengths in zip(places, ([20, 110, 0, 120], [0, 100, 40, 1]), strict=True):
        place.copy_(cu_seqlens(lengths))
    graph.replay()
    torch.testing.assert_close(out, attend("ref"), atol=2e-2, rtol=2e-2)
