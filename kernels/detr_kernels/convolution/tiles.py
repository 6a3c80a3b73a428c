"""Tiles of the GEMMs of a 1x1 convolution, and what their kernels share.

Pixels are rows: in channels-last memory x is (B, H, W, C), and a pixel is C adjacent entries. The forward GEMM sums
over the inputs C, the gradient of x over the outputs N, and the gradient of the weight over the pixels. Those are many,
and the weight's tiles few: so the pixels are split (split-K) by a number that depends on shapes alone, and the partial
sums are added in a fixed order. The same inputs give the same gradient, bit for bit.
"""

from dataclasses import dataclass
from typing import Any

import torch

from detr_kernels.launch import cdiv, next_power_of_2
from detr_kernels.triton_compat import INTERPRETED, tl, triton

PROGRAMS = 256
"""Fewer would leave multiprocessors idle: about two for each of an H100's 132."""


@dataclass(frozen=True)
class Blocks:
    """The tile of a program in a GEMM (rows, inner) x (inner, columns), its warps and its pipeline."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    splits: int = 1
    """Parts of the inner dimension, each with partial sums of its own (split-K)."""
    group: int = 8
    """Tiles of rows that are computed near each other in time, and so find the columns' operand in the L2 cache."""


def choose_blocks(
    rows: int, columns: int, inner: int, dtype: torch.dtype, masked: bool = False, split: bool = False
) -> Blocks:
    """Choose blocks by a rule that was made from an H100's figures and is not tuned on a GPU yet.

    128x128 sums on 8 warps are 64 registers a thread; with at most 128 in all, two programs share a multiprocessor.
    Three stages of two operands, each 128 bytes of every row, are 96 KiB of its 227. `masked`: one operand is made of
    two, so half as deep. Where tiles are few they are smaller, or, with `split`, the inner dimension is cut too.
    float32 multiplies without tensor cores: small tiles.
    """
    few = not split and cdiv(rows, 128) * cdiv(columns, 128) < PROGRAMS
    side = 64 if few or dtype == torch.float32 else 128
    depth = (64 if masked else 128) // dtype.itemsize
    tall, wide, deep = (
        min(most, max(16, next_power_of_2(size))) for size, most in ((rows, side), (columns, side), (inner, depth))
    )
    steps = cdiv(inner, deep)
    splits = max(1, min(PROGRAMS // (cdiv(rows, tall) * cdiv(columns, wide)), steps)) if split else 1
    warps = 8 if tall * wide >= 64 * 64 else 4
    return Blocks(tall, wide, deep, warps, num_stages=max(2, min(3, cdiv(steps, splits))), splits=splits)


@triton.jit
def tile_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Return row and column of the program's tile: GROUP tiles down, then the next column, then the next group."""
    program = tl.program_id(0)
    across = tl.cdiv(columns, COLUMNS)
    first = program // (GROUP * across) * GROUP
    down = min(tl.cdiv(rows, ROWS) - first, GROUP)
    within = program % (GROUP * across)
    return first + within % down, within // down


@triton.jit
def source_pixel(pixel, height, width, STRIDE: tl.constexpr):
    """Return the pixel of x, `height` x `width` an image, that `pixel` of the output sees; int64, as offsets may be."""
    if STRIDE == 1:
        return pixel.to(tl.int64)
    out_height = (height - 1) // STRIDE + 1
    out_width = (width - 1) // STRIDE + 1
    line = pixel // out_width
    source_line = (line // out_height).to(tl.int64) * height + line % out_height * STRIDE
    return source_line * width + pixel % out_width * STRIDE


def launch_options(blocks: Blocks) -> dict[str, Any]:
    """Return what every kernel here is launched with, besides its tile."""
    pipeline = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return {"GROUP": blocks.group, "INTERPRETED": INTERPRETED, **pipeline}
