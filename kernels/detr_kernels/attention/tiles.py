"""Shared parts of the packed attention kernels: an image's rows, rows of padding, blocks and grid.

A program has one image and head: axis 0 counts blocks of rows, axis 1 images and, as one more, the rows of padding,
axis 2 heads.
"""

import math
from typing import Any

import torch
from torch import Tensor

from detr_kernels.launch import cdiv
from detr_kernels.triton_compat import INTERPRETED, tl, triton

WIDTHS = (16, 32, 64)
"""Widths of a head that the kernels take."""


@triton.jit
def image_rows(cu_seqlens, image, rows):
    """Load the first row of `image` and its number of rows; the last image is the padding, which ends at `rows`."""
    first = tl.load(cu_seqlens + image)
    return first, tl.load(cu_seqlens + image + 1, mask=image + 1 < tl.num_programs(1), other=rows) - first


@triton.jit
def zero_padding_rows(out, first, rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store zeros to the rows of `out` from `first` on, which are padding; the programs of axis 0 share them."""
    column = tl.arange(0, WIDTH)[None, :] + tl.program_id(2) * WIDTH
    for start in range(first + tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        at = row.to(tl.int64) * (HEADS * WIDTH) + column
        tl.store(out + at, tl.zeros((BLOCK, WIDTH), out.dtype.element_ty), mask=row < rows)


def options(q: Tensor, p: float) -> dict[str, Any]:
    """Choose the constants and blocks of a launch.

    64 x 64 scores are 32 a thread. On an H100 larger tiles let half as many warps run at once, and smaller ones waste
    matrix units. Float32 uses none, and 16 queries are what its registers hold.
    """
    heads, width = q.shape[1:]
    sizes = {"P": p, "HEADS": heads, "WIDTH": width, "SCALE": 1 / math.sqrt(width), "INTERPRETED": INTERPRETED}
    blocks = {"BLOCK_Q": 16 if q.dtype == torch.float32 else 64, "BLOCK_K": 64}
    return {**sizes, **blocks, "num_warps": 4, "num_stages": 2}


def grid(cu_seqlens: Tensor, max_seqlen: int, block: int, heads: int) -> tuple[int, int, int]:
    """Count blocks of the longest image, images and one for padding, heads; a block past an image's end is idle."""
    return cdiv(max_seqlen, block), cu_seqlens.shape[0], heads


def side_by_side(x: Tensor) -> Tensor:
    """Return x (rows, H, d), copied unless a row's heads are adjacent, as in a slice of a projection's output."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
