"""xformers' FlashAttention behind `packed_attention`: which tensors reach it, what comes back, and why it may not run.

Its kernels need a GPU. Here a stand-in on the CPU for the two operators that xformers registers does what they promise,
and no more: what FlashAttention leaves undefined is NaN.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from detr_kernels import OPERATIONS, Choice, Facts, packed_attention, packed_attention_ref
from detr_kernels.attention import xformers as xformers_attention
from detr_profiling.comparison.closeness import assert_same_function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda")
PROBLEM = xformers_attention.why_not_xformers()
needs_xformers = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
pytestmark = pytest.mark.usefixtures("poisoned")

# queries and keys of the images: several, one, none of either, no keys, no queries
LENGTHS = [6, 1, 0, 4, 0], [9, 1, 0, 0, 3]
TAIL = 2
UNDEFINED = float("nan")


def places() -> tuple[Tensor, Tensor, int, int]:
    """Offsets of queries and keys, and bounds on the lengths, as `packed_attention` takes them."""
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in LENGTHS)
    return cu_seqlens_q, cu_seqlens_k, max(LENGTHS[0]) + 1, max(LENGTHS[1]) + 1


def make_inputs() -> list[Tensor]:
    """q, k and v (rows, 2, 8) in float16, slices of wider rows."""
    generator = torch.Generator().manual_seed(0)
    rows = [sum(lengths) + TAIL for lengths in (*LENGTHS, LENGTHS[1])]
    return [torch.randn(each, 48, generator=generator).half()[:, 16:32].unflatten(1, (2, 8)) for each in rows]


def answered(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, p: float, seed: int) -> Iterator[Any]:
    """Of each image that has queries and keys: where they lie, the weights in float32, and dropout's factors."""
    generator = torch.Generator().manual_seed(seed)
    for (q_start, k_start), (q_end, k_end) in pairwise(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)):
        if q_end > q_start and k_end > k_start:
            queries, keys = slice(q_start, q_end), slice(k_start, k_end)
            weights = (torch.einsum("qhd,khd->hqk", q[queries].float(), k[keys].float()) / 8**0.5).softmax(-1)
            yield queries, keys, weights, (torch.rand(weights.shape, generator=generator) >= p) / (1 - p)


def flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, p: float, seed: int) -> Tensor:
    """What FlashAttention computes, in float32."""
    out = torch.full(q.shape, UNDEFINED)
    for queries, keys, weights, factors in answered(q, k, cu_seqlens_q, cu_seqlens_k, p, seed):
        out[queries] = torch.einsum("hqk,khd->qhd", weights * factors, v[keys].float())
    return out


def forward_on_the_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, used, max_seqlen_q, max_seqlen_k, p, scale, causal, *rest):  # type: ignore[no-untyped-def]
    assert (used, causal, *rest) == (None, False, -1, -1, False, None)  # no window, no table
    assert scale == pytest.approx(8**-0.5)
    assert (max_seqlen_q, max_seqlen_k) == places()[2:]
    state = torch.tensor([int(torch.randint(1000, ())), 5]).to(torch.uint64)
    out = flash(q, k, v, cu_seqlens_q, cu_seqlens_k, p, int(state[0])).to(q.dtype)
    return out, torch.full((2, len(q)), UNDEFINED), state


def backward_on_the_cpu(  # type: ignore[no-untyped-def]
    shared, dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p, *rest
):
    state = rest[-1]
    assert state is None if p == 0 else state.dtype == torch.uint64  # torch's kernel reads no other
    seed = int(state[0]) if p else 0
    assert torch.equal(flash(q, k, v, cu_seqlens_q, cu_seqlens_k, p, seed).to(q.dtype).nan_to_num(0), out.nan_to_num(0))
    dq, dk, dv = (torch.full_like(x, UNDEFINED) for x in (q, k, v))
    for queries, keys, weights, factors in answered(q, k, cu_seqlens_q, cu_seqlens_k, p, seed):
        upstream = dout[queries].float()
        dweights = torch.einsum("qhd,khd->hqk", upstream, v[keys].float()) * factors
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) / 8**0.5
        dq[queries] = torch.einsum("hqk,khd->qhd", dscores, k[keys].float()).to(q.dtype)
        dk[keys] = torch.einsum("hqk,qhd->khd", dscores, q[queries].float()).to(q.dtype)
        dv[keys] = torch.einsum("hqk,qhd->khd", weights * factors, upstream).to(q.dtype)
    return dq, dk, dv


@pytest.fixture
def flash_on_the_cpu() -> None:
    """xformers' operators, which it registers for CUDA alone, on the CPU too: from here to the end of the process."""
    torch.library.register_kernel("xformers_flash::flash_fwd", "cpu", forward_on_the_cpu)
    torch.library.register_kernel("xformers_flash::flash_bwd", "cpu", backward_on_the_cpu)


def by_xformers(p: float = 0.0) -> Callable[..., Tensor]:
    return lambda q, k, v: xformers_attention.xformers_attention(q, k, v, *places(), p)


@needs_xformers
@pytest.mark.usefixtures("flash_on_the_cpu")
def test_nothing_undefined_comes_out_or_goes_into_gradients() -> None:
    assert_same_function(by_xformers(), lambda *qkv: packed_attention_ref(*qkv, *places()), make_inputs(), 5e-4)


@needs_xformers
@pytest.mark.usefixtures("flash_on_the_cpu")
def test_the_state_of_dropout_reaches_the_backward_pass() -> None:
    p, inputs = 0.4, [x.requires_grad_() for x in make_inputs()]
    torch.manual_seed(3)
    out = by_xformers(p)(*inputs)
    torch.manual_seed(3)
    seed = int(torch.randint(1000, ()))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    reference = flash(*exact, *places()[:2], p, seed)
    torch.testing.assert_close(out.float(), reference.nan_to_num(0), atol=2e-3, rtol=1e-3)
    weighting = torch.randn(out.shape).half()
    gradients = torch.autograd.grad(out, inputs, weighting)
    reference_gradients = torch.autograd.grad(reference, exact, weighting.float())
    for gradient, expected in zip(gradients, reference_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=2e-3, rtol=2e-3)


@needs_xformers
@pytest.mark.usefixtures("flash_on_the_cpu")
def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda *qkv: by_xformers()(*qkv).relu(), fullgraph=True, backend="aot_eager")
    eager = lambda *qkv: packed_attention_ref(*qkv, *places()).relu()  # noqa: E731
    assert_same_function(compiled, eager, make_inputs(), 5e-4)


@needs_xformers
@pytest.mark.usefixtures("flash_on_the_cpu")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_operators_are_registered_as_torch_asks(p: float) -> None:
    from detr_kernels.attention.xformers import forward_op

    torch.library.opcheck(
        forward_op, (*make_inputs(), *places(), p), test_utils=["test_schema", "test_autograd_registration"]
    )


@needs_xformers
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_shapes_on_a_gpu_that_is_not_there(p: float) -> None:
    with FakeTensorMode():  # has no values to read
        projected = torch.zeros(1600, 768, dtype=torch.bfloat16, device="cuda")
        q, k, v = (each.unflatten(1, (8, 32)) for each in projected.chunk(3, 1))
        cu_seqlens = torch.zeros(17, dtype=torch.int32, device="cuda")
        arguments = (cu_seqlens, cu_seqlens, 100, 100, p)
        for halves in (
            (xformers_attention.forward_op, xformers_attention.backward_op),  # as a compiler sees them
            (xformers_attention._forward, xformers_attention._backward),  # as they are, through xformers
        ):
            results = halves[0](q, k, v, *arguments)
            described = [(each.shape, each.dtype, each.is_contiguous()) for each in results]
            assert described == [
                (q.shape, torch.bfloat16, True),
                ((8, 1600), torch.float32, True),
                ((2,), torch.int64, True),
            ]
            gradients = halves[1](results[0], q, k, v, *results, *arguments)
            assert [(each.shape, each.dtype, each.is_contiguous()) for each in gradients] == 3 * described[:1]
        out = packed_attention(q, k, v, *arguments, training=True)
        compiled = torch.compile(
            lambda q: packed_attention(q, k, v, *arguments, training=True), fullgraph=True, backend="aot_eager"
        )
        assert out.shape == compiled(q).shape == q.shape


def chosen(device: torch.device, dtype: torch.dtype, head_dim: int, training: bool, asked: str = "auto") -> Choice:
    return OPERATIONS["attention"].choose(Facts(device, dtype, training, head_dim=head_dim), asked)


def test_a_gpu_runs_torchs_attention_unless_another_was_measured_to_win() -> None:
    name, reason = chosen(GPU, torch.bfloat16, 32, True)
    assert name == "sdpa" and "measured" in reason


def test_flash_attention_runs_in_16_bits_and_says_why_not_otherwise() -> None:
    for dtype, head_dim, message in [
        (torch.float32, 32, "not in float32"),
        (torch.float16, 36, "not 36"),
        (torch.float16, 256, "not 256"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            chosen(GPU, dtype, head_dim, True, "xformers")
    if PROBLEM is None and not torch.cuda.is_available():
        assert chosen(GPU, torch.bfloat16, 32, True, "xformers") == ("xformers", "asked for")
        assert chosen(GPU, torch.float16, 256, False, "xformers") == ("xformers", "asked for")


@pytest.mark.parametrize("asked", ["sdpa", "ref"])
def test_what_torch_does_is_always_there(asked: str) -> None:
    assert chosen(torch.device("cpu"), torch.float64, 7, True, asked) == (asked, "asked for")


def test_what_cannot_run_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"attention by xformers: xformers has no cpu path.* Or ask for auto"):
        chosen(torch.device("cpu"), torch.bfloat16, 32, True, "xformers")
    with pytest.raises(RuntimeError, match=r"attention by triton: .* float64"):
        chosen(torch.device("cpu"), torch.float64, 32, True, "triton")
    with pytest.raises(ValueError, match="not 'flash'"):
        chosen(GPU, torch.bfloat16, 32, True, "flash")


@needs_xformers
def test_its_own_extension_need_not_load() -> None:
    """FlashAttention is torch's. Nothing is printed of an extension that is built for another CUDA."""
    code = """if True:
        import torch, detr_kernels
        def load_library(path):
            raise OSError("libcudart.so.12: cannot open shared object file")
        torch.ops.load_library = load_library
        facts = detr_kernels.Facts(torch.device("cuda"), torch.bfloat16, True)
        print(*detr_kernels.OPERATIONS["attention"].choose(facts, "xformers"))
        from torch._subclasses import FakeTensorMode
        with FakeTensorMode():
            q = torch.zeros(100, 8, 32, dtype=torch.bfloat16, device="cuda")
            cu_seqlens = torch.zeros(3, dtype=torch.int32, device="cuda")
            print(detr_kernels.attention.xformers._forward(q, q, q, cu_seqlens, cu_seqlens, 50, 50, 0.1)[0].shape)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "xformers asked for\ntorch.Size([100, 8, 32])\n" and "WARNING" not in result.stderr


def test_a_missing_xformers_is_a_reason_and_is_looked_for_only_when_needed() -> None:
    code = """if True:
        import sys, torch, detr_kernels
        print("xformers" in sys.modules)
        sys.modules["xformers"] = None
        facts = detr_kernels.Facts(torch.device("cuda"), torch.bfloat16)
        print(*detr_kernels.OPERATIONS["attention"].choose(facts, "sdpa"))
        print(detr_kernels.why_not_xformers())
    """
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("False\nsdpa asked for\nxformers cannot be imported (ModuleNotFoundError: ")
