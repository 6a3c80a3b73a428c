"""Dropout, residual add and LayerNorm in one pass over memory, forward and backward.

    total = residual + dropout(x)
    y     = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias          over the last dimension

It ends every sublayer of a post-norm transformer (Vaswani et al. 2017, section 3.1; Ba et al. 2016). Eager code reads
and writes the tokens in five passes; here each is read once and written once. For the backward pass `total` alone is
kept: mean and variance are cheap to find again, and the mask is drawn again from its seed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.dropout.pcg64 import apply_dropout
from detr_kernels.dropout.philox import draw_seed, keep_mask
from detr_kernels.launch import REFERENCE, TRITON, cdiv, launch, next_power_of_2
from detr_kernels.registry import Facts, Operation, zero_flop
from detr_kernels.specimens import DIM, IMAGES, TOKENS, meta
from detr_kernels.triton_compat import tl, triton

TILE = 2048
"""Entries that a program holds at a time: 16 a thread with 4 warps. With twice as many the backward pass takes 172
registers a thread, and one program fills a multiprocessor."""
PARTIAL_SUMS = 256
"""Programs of the backward pass, and so rows of partial weight gradients: a few to every multiprocessor."""


def fused_add_layer_norm_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
    dropout_backend: str = "ref",
) -> Tensor:
    """Compute `fused_add_layer_norm` in plain torch."""
    dropped = apply_dropout(x, dropout, training, dropout_backend)
    return F.layer_norm(residual + dropped, weight.shape, weight, bias, eps)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,  # (rows, dim)
    residual,  # (rows, dim)
    weight,  # (dim,)
    bias,  # (dim,)
    seed,  # (1,) int64
    y,  # (rows, dim)
    total,  # (rows, dim)
    rows,
    dim,
    eps,
    p,
    DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    inside = (row < rows) & (column < dim)
    at = row.to(tl.int64) * dim + column
    entry = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        entry = tl.where(keep_mask(tl.load(seed), row * dim + column, p), entry * (1 / (1 - p)), 0.0)
    entry += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(total + at, entry.to(total.dtype.element_ty), mask=inside)
    mean = tl.sum(entry, 1)[:, None] / dim
    centered = tl.where(column < dim, entry - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] / dim + eps)
    w = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < dim, other=0.0).to(tl.float32)
    tl.store(y + at, (centered * rstd * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy,  # (rows, dim)
    total,  # (rows, dim)
    weight,  # (dim,)
    seed,  # (1,) int64
    dx,  # (rows, dim)
    dresidual,  # (rows, dim)
    dweight,  # (programs, dim) float32, to be summed
    dbias,  # (programs, dim) float32, to be summed
    rows,
    dim,
    eps,
    p,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, DIM)[None, :]
    w = tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)
    sum_dweight = tl.zeros((ROWS, DIM), tl.float32)
    sum_dbias = tl.zeros((ROWS, DIM), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < dim)
        at = row.to(tl.int64) * dim + column
        entry = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(entry, 1)[:, None] / dim
        centered = tl.where(inside, entry - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, 1)[:, None] / dim + eps)
        normed = tl.where(inside, centered * rstd, 0.0)  # without eps a row past the last would give NaN
        sum_dweight += grad * normed
        sum_dbias += grad
        grad *= w
        along = tl.sum(grad * normed, 1)[:, None] / dim
        dtotal = rstd * (grad - tl.sum(grad, 1)[:, None] / dim - normed * along)
        tl.store(dresidual + at, dtotal.to(dresidual.dtype.element_ty), mask=inside)
        if DROPOUT:
            dtotal = tl.where(keep_mask(tl.load(seed), row * dim + column, p), dtotal * (1 / (1 - p)), 0.0)
        tl.store(dx + at, dtotal.to(dx.dtype.element_ty), mask=inside)
    at = program * dim + tl.arange(0, DIM)
    tl.store(dweight + at, tl.sum(sum_dweight, 0), mask=tl.arange(0, DIM) < dim)
    tl.store(dbias + at, tl.sum(sum_dbias, 0), mask=tl.arange(0, DIM) < dim)


def _blocks(dim: int) -> dict[str, int]:
    """Choose how many rows of how many entries a program holds at a time."""
    width = next_power_of_2(dim)
    return {"ROWS": max(1, TILE // width), "DIM": width}


def _empty_total(x: Tensor, residual: Tensor, save: bool) -> Tensor:
    """Allocate `total`; no entry of it where there is no backward pass."""
    return torch.empty(x.shape if save else (0,), dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)


def _forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor, eps: float, p: float, save: bool
) -> tuple[Tensor, Tensor]:
    """Compute y (rows, dim) of x, residual (rows, dim) in their promoted dtype, and `total` where it is to be saved."""
    x, residual, weight, bias = (each.contiguous() for each in (x, residual, weight, bias))
    total = _empty_total(x, residual, save)
    y = torch.empty_like(x, dtype=total.dtype)
    rows, dim = x.shape
    blocks = _blocks(dim)
    grid = (cdiv(rows, blocks["ROWS"]),)
    arguments = (x, residual, weight, bias, seed, y, total, rows, dim, eps, p)
    launch(_forward_kernel, grid, *arguments, DROPOUT=p > 0, SAVE=save, **blocks, num_warps=4)
    return y, total


def _backward(
    dy: Tensor,
    total: Tensor,
    weight: Tensor,
    seed: Tensor,
    eps: float,
    p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, residual (rows, dim), weight and bias (dim,)."""
    dy, weight = dy.contiguous(), weight.contiguous()
    dx, dresidual = torch.empty_like(total, dtype=x_dtype), torch.empty_like(total, dtype=residual_dtype)
    rows, dim = total.shape
    blocks = _blocks(dim)
    programs = min(PARTIAL_SUMS, cdiv(rows, blocks["ROWS"]))
    dweight, dbias = (torch.empty(programs, dim, dtype=torch.float32, device=total.device) for _ in range(2))
    arguments = (dy, total, weight, seed, dx, dresidual, dweight, dbias, rows, dim, eps, p)
    launch(_backward_kernel, (programs,), *arguments, DROPOUT=p > 0, **blocks, num_warps=8)
    return dx, dresidual, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)


forward_op = torch.library.custom_op("detr_kernels::add_layer_norm", _forward, mutates_args=())
backward_op = torch.library.custom_op("detr_kernels::add_layer_norm_backward", _backward, mutates_args=())


@forward_op.register_fake
def _(x, residual, weight, bias, seed, eps, p, save):
    total = _empty_total(x, residual, save)
    return torch.empty(x.shape, dtype=total.dtype, device=x.device), total


@backward_op.register_fake
def _(dy, total, weight, seed, eps, p, x_dtype, residual_dtype):
    dx, dresidual = (total.new_empty(total.shape, dtype=dtype) for dtype in (x_dtype, residual_dtype))
    return dx, dresidual, torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, _, seed, ctx.eps, ctx.p, _ = inputs
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what is not differentiated would be memory written for nothing


def _autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, seed = ctx.saved_tensors
    return *backward_op(dy, total, weight, seed, ctx.eps, ctx.p, *ctx.dtypes), None, None, None, None


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def _specimens() -> None:
    x, residual = meta(IMAGES * TOKENS, DIM), meta(IMAGES * TOKENS, DIM, dtype=torch.float32)
    weight, seed = meta(DIM, dtype=torch.float32), meta(1, dtype=torch.int64)
    y, total = _forward(x, residual, weight, weight, seed, 1e-5, 0.1, True)
    _backward(y, total, weight, seed, 1e-5, 0.1, x.dtype, residual.dtype)


OPERATION = Operation(
    "layer_norm",
    (TRITON, REFERENCE),
    flop=dict.fromkeys(("add_layer_norm", "add_layer_norm_backward"), zero_flop),
    specimens=_specimens,
)


def fused_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    dropout_backend: str = "auto",
) -> Tensor:
    """Compute `F.layer_norm(residual + F.dropout(x, dropout, training), ...)`.

    x, residual (..., D), weight, bias (D,). Returns (..., D) in the promoted dtype of x and residual; sums are float32.
    triton draws dropout's mask itself; ref leaves it to `dropout_backend` of `apply_dropout`. Only with ref in both is
    it the one that `F.dropout` draws from the same seed. Raises ValueError for shapes that do not fit and RuntimeError
    where a backend that is asked for cannot run.
    """
    if x.shape != residual.shape or x.shape[-1:] != weight.shape or weight.shape != bias.shape:
        shapes = [tuple(each.shape) for each in (x, residual, weight, bias)]
        raise ValueError(f"x and residual must be (..., D), weight and bias (D,); got {shapes}")
    if OPERATION.choose(Facts(x.device), backend).backend == "ref":
        return fused_add_layer_norm_ref(x, residual, weight, bias, eps, dropout, training, dropout_backend)
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        residual = residual.float()  # there F.layer_norm computes in float32, and so does what follows it
    p = dropout if training else 0.0
    save = torch.is_grad_enabled() and any(each.requires_grad for each in (x, residual, weight, bias))
    seed = draw_seed(x.device) if p > 0 else torch.empty(1, dtype=torch.int64, device=x.device)
    y, _ = forward_op(x.flatten(0, -2), residual.flatten(0, -2), weight, bias, seed, eps, p, save)
    return y.view(x.shape)
