"""What the packed attention kernels share: an image's extent, the tail, products, and dropout's mask for a tile.

A program has one image and head: axis 0 counts blocks of rows, axis 1 images and, as one more, the tail of rows that
belong to none, axis 2 heads.
"""

import math
from typing import Any

import torch
from torch import Tensor

from detr_kernels.dispatch import cdiv
from detr_kernels.language import INTERPRETED, tl, triton

WIDTHS = (16, 32, 64)
"""Widths of a head that the kernels take."""


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):
    """a @ b in float32; Triton's interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def kept_weights(seed, first_query, first_key, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which weights of a tile survive dropout with probability `P`, to 1/65536: bool (BLOCK_Q, BLOCK_K).

    A call of Philox (7 rounds, the fewest that pass every test: Salmon et al. 2011) gives eight numbers of 16 bits.
    They go to keys 8 apart, because a thread holds just those of a matrix product: no number changes hands. A call for
    each weight would make 3.6 times as many instructions of the forward pass's loop.
    """
    query = first_query + tl.arange(0, BLOCK_Q)[:, None]
    eight_keys = first_key // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    a, b, c, d = tl.philox(seed, query, eight_keys, 0, 0, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    numbers = tl.reshape(tl.join(words, words << 16), (BLOCK_Q, BLOCK_K // 64, 8, 8))
    THRESHOLD: tl.constexpr = int(P * 65536) << 16  # what is below the upper 16 bits cannot change the comparison
    return tl.reshape(tl.permute(numbers, (0, 1, 3, 2)), (BLOCK_Q, BLOCK_K)) >= THRESHOLD


@triton.jit
def extent(offsets, image, rows):
    """First row of `image` and its number of rows; the last image is the tail, which ends at `rows`."""
    first = tl.load(offsets + image)
    return first, tl.load(offsets + image + 1, mask=image + 1 < tl.num_programs(1), other=rows) - first


@triton.jit
def zero_tail(out, first, rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros to the rows of `out` from `first` on, which belong to no image; the programs of axis 0 share them."""
    column = tl.arange(0, WIDTH)[None, :] + tl.program_id(2) * WIDTH
    for start in range(first + tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        at = row.to(tl.int64) * (HEADS * WIDTH) + column
        tl.store(out + at, tl.zeros((BLOCK, WIDTH), out.dtype.element_ty), mask=row < rows)


def options(q: Tensor, p: float) -> dict[str, Any]:
    """Constants and blocks of a launch.

    64 x 64 scores are 32 a thread. On an H100 larger tiles leave room for half as many warps, and smaller ones waste
    matrix units. Float32 uses none, and 16 queries are what its registers hold.
    """
    heads, width = q.shape[1:]
    sizes = {"P": p, "HEADS": heads, "WIDTH": width, "SCALE": 1 / math.sqrt(width), "INTERPRETED": INTERPRETED}
    blocks = {"BLOCK_Q": 16 if q.dtype == torch.float32 else 64, "BLOCK_K": 64}
    return {**sizes, **blocks, "num_warps": 4, "num_stages": 2}


def grid(offsets: Tensor, longest: int, block: int, heads: int) -> tuple[int, int, int]:
    """Blocks of the longest image, images and the tail, heads; a block past its image's end does nothing."""
    return cdiv(longest, block), offsets.shape[0], heads


def side_by_side(x: Tensor) -> Tensor:
    """x (rows, H, d) with the heads of a row side by side, as in a slice of a projection's output; else a copy."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
