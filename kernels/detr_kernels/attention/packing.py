"""Packing of tokens: those of all images one after another, without asking the device how many there are.

A batch of tokens (B, N, D) and its padding mask (B, N) become (B*N, D) with the real tokens first, in the images'
order, and the padded ones behind them. So the shape is the same whatever the mask says: nothing waits for the host,
and a captured graph serves every mask. Linear layers and norms still compute the rows of padding; attention skips them.
(The usual unpadding before FlashAttention drops these rows, and so reads the mask on the host.)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class _Gather(torch.autograd.Function):
    """Index rows, with a gradient that is gathered by the inverse: autograd itself would scatter into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Compute x[index], where row i of x is row `inverse[i]` of the result: an exact gradient without a scatter."""
    return _Gather.apply(x, index, inverse)


def images_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Find the image (rows,) int64 of each packed row, by `cu_seqlens` (B+1,) int32; B for a row of padding."""
    return torch.searchsorted(
        cu_seqlens[1:], torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device), right=True
    )


class ZeroRows(NamedTuple):
    """Masks of the packed rows that get zeros in attention: padding, and images without a row on the other side."""

    queries: Tensor | None
    """(Mq,) bool; None: no row."""
    keys: Tensor | None
    """(Mk,) bool; None: no row."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int) -> "ZeroRows":
        """Find them for any `cu_seqlens` (B+1,), of `queries` and `keys` rows."""
        return cls(_alone(cu_seqlens_q, cu_seqlens_k, queries), _alone(cu_seqlens_k, cu_seqlens_q, keys))


def _alone(cu_seqlens: Tensor, other_cu_seqlens: Tensor, rows: int) -> Tensor:
    none = F.pad(other_cu_seqlens.diff() <= 0, (0, 1), value=True)  # True for padding
    return none[images_of_rows(cu_seqlens, rows)]


@dataclass(frozen=True)
class Packing:
    """The order of a batch's tokens when those of all images lie one after another."""

    cu_seqlens: Tensor
    """(B+1,) int32: image b's tokens are rows cu_seqlens[b] to cu_seqlens[b+1]."""
    order: Tensor | None
    """(B*N,) int64: row i is token order[i] of the flattened batch. None where nothing is padded."""
    inverse: Tensor | None
    """(B*N,) int64: token i of the flattened batch is row inverse[i]."""
    max_seqlen: int
    """N: no image has more tokens."""
    padding: Tensor | None = None
    """(B*N,) bool: rows of padding, which belong to no image. None where nothing is padded."""
    empty: Tensor | None = None
    """(B,) bool: images without a token. None where nothing is padded."""

    @property
    def images(self) -> int:
        """Count the images, B."""
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def of(cls, padding: Tensor) -> "Packing":
        """Pack by `padding` (B, N) bool, True where padded; on its device."""
        images, max_seqlen = padding.shape
        real = ~padding.flatten()
        before = real.cumsum(0)
        cu_seqlens = F.pad((~padding).sum(1).cumsum(0), (1, 0))
        rows = torch.arange(images * max_seqlen, device=padding.device)
        inverse = torch.where(real, before - 1, cu_seqlens[-1] + rows - before)
        order = torch.empty_like(rows).scatter_(0, inverse, rows)
        return cls(cu_seqlens.int(), order, inverse, max_seqlen, rows >= cu_seqlens[-1], padding.all(1))

    @classmethod
    def uniform(cls, images: int, max_seqlen: int, device: torch.device | str) -> "Packing":
        """Pack images of `max_seqlen` tokens each, none padded: packing and unpacking are views."""
        cu_seqlens = torch.arange(images + 1, dtype=torch.int32, device=device) * max_seqlen
        return cls(cu_seqlens, None, None, max_seqlen)

    def zero_rows(self, keys: "Packing") -> ZeroRows:
        """Find which rows get zeros where these are queries and attend to `keys`: once for all layers that do."""
        if keys is self:
            return ZeroRows(self.padding, self.padding)
        return ZeroRows(self._zero_rows(keys), keys._zero_rows(self))

    def _zero_rows(self, other: "Packing") -> Tensor | None:
        if other.empty is None:
            return self.padding
        of_images = other.empty[:, None].expand(-1, self.max_seqlen).flatten()
        if self.padding is None:
            return of_images
        return _alone(self.cu_seqlens, other.cu_seqlens, len(self.padding))

    def pack(self, x: Tensor) -> Tensor:
        """Reorder (B, N, ...) to (B*N, ...), padding behind. Raises ValueError for another shape."""
        if x.shape[:2] != (self.images, self.max_seqlen):
            raise ValueError(f"tokens must be ({self.images}, {self.max_seqlen}, ...); got {tuple(x.shape)}")
        x = x.flatten(0, 1)
        return x if self.order is None or self.inverse is None else gather_rows(x, self.order, self.inverse)

    def unpack(self, x: Tensor) -> Tensor:
        """Reorder (B*N, ...) to (B, N, ...), the inverse of `pack`. Raises ValueError for another shape."""
        if x.shape[0] != self.images * self.max_seqlen:
            raise ValueError(f"rows must be {self.images * self.max_seqlen}; got {tuple(x.shape)}")
        if self.order is not None and self.inverse is not None:
            x = gather_rows(x, self.inverse, self.order)
        return x.unflatten(0, (self.images, self.max_seqlen))
