"""Images of different size to one batch: resized, flipped, recolored, normalised, padded, in one pass over memory.

    batch[b, c, y, x] = (level / 255 - mean[c]) / std[c]                     inside image b, 0 where it is padded
    level             = round(sum over i, j of p[y, i] q[x, j] image_b[i, j, c])
    p[y, i]           ~ max(0, 1 - |i + 1/2 - (y + 1/2) s| / max(s, 1))      s = rows of image_b / rows in the batch

Where images have a color matrix (3, 4), the three levels of a pixel are first made
clamp(matrix[:, :3] level + matrix[:, 3], 0, 255).

p's rows sum to 1, and q is the same across: bilinear with antialiasing, as Pillow's. An image that keeps its size keeps
its numbers. Eager code writes the batch some seven times; here it is written once, and of an image only what is seen is
read. All that follows the rounding is done as IEEE 754 asks, so that float32 is, to the last bit and on any device,
what torch computes on the CPU, and the official DETR (Carion et al. 2020) with it. (On a GPU torch divides by a number
by multiplying with its reciprocal: x / 255 then errs in the last bit for 126 of the 256 values.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detr_kernels.launch import DTYPES, REFERENCE, TRITON, cdiv, launch
from detr_kernels.registry import Facts, Operation, zero_flop
from detr_kernels.specimens import IMAGES, meta
from detr_kernels.triton_compat import tl, triton

ROWS, ENTRIES = 2, 512
"""Rows of how many entries (3 a pixel) a program makes: 8 entries a thread, whose loads of a tap are under way at once;
512 leave a ninth of the last block idle at 1066 pixels, 1024 would leave a quarter."""


class Slot(NamedTuple):
    """Position and size of an image in the buffer, the size that it is to have, and whether it is to be flipped."""

    offset: int
    """The byte at which it begins, row by row from there, three bytes a pixel."""
    height: int
    width: int
    new_height: int
    new_width: int
    hflip: int
    """1: flipped horizontally, after resizing; 0: not."""


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Images of different size in one buffer, each with the size that it is to have."""

    buffer: Tensor
    """uint8 (n,)"""
    table: Tensor
    """(B, 6) int64: the slots, on the buffer's device"""
    slots: tuple[Slot, ...]
    """The rows of `table`, known without asking the device."""
    colors: Tensor | None = None
    """(B, 3, 4) float32: maps of each image's levels, 0 to 255, a matrix and what is added; None: they stay."""

    def __post_init__(self) -> None:
        if self.buffer.dtype != torch.uint8 or self.buffer.ndim != 1 or not self.buffer.is_contiguous():
            raise ValueError(f"buffer must be contiguous uint8 (n,), not {self.buffer.dtype} {self.buffer.shape}")
        if self.table.shape != (len(self.slots), 6) or self.table.dtype != torch.int64:
            raise ValueError(f"table must be ({len(self.slots)}, 6) int64, not {self.table.dtype} {self.table.shape}")
        if self.colors is not None and (self.colors.shape, self.colors.dtype) != ((len(self), 3, 4), torch.float32):
            raise ValueError(f"colors must be ({len(self)}, 3, 4) float32, not {self.colors.dtype} {self.colors.shape}")

    @classmethod
    def from_list(
        cls,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]] | None = None,
        hflip: Sequence[bool] | None = None,
        colors: Sequence[Sequence[float]] | None = None,
    ) -> Self:
        """Copy at least one uint8 (h, w, 3) on the CPU, contiguous or not, into one buffer.

        `sizes`: (h, w) that each is to have; default: its own. `colors`: each one's (3, 4), row by row; default: none.
        Raises ValueError for anything else.
        """
        if not images:
            raise ValueError("no images: a batch has at least one")
        for image in images:
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.device.type != "cpu":
                got = f"{image.dtype} {tuple(image.shape)} on {image.device}"
                raise ValueError(f"images must be uint8 (h, w, 3) on the CPU; got {got}")
            if 0 in image.shape:
                raise ValueError(f"an image of {tuple(image.shape)} has no pixels")
        own = [(image.shape[0], image.shape[1]) for image in images]
        offsets = accumulate((image.numel() for image in images[:-1]), initial=0)
        columns = zip(offsets, own, sizes or own, hflip or [False] * len(images), strict=True)
        slots = tuple(Slot(offset, *size, *new, int(flip)) for offset, size, new, flip in columns)
        if wrong := [slot for slot in slots if min(slot.new_height, slot.new_width) < 1]:
            raise ValueError(f"sizes must be at least 1 x 1; got {wrong}")
        maps = None if colors is None else torch.tensor(colors, dtype=torch.float32).view(-1, 3, 4)
        return cls(torch.cat([image.reshape(-1) for image in images]), torch.tensor(slots), slots, maps)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield views (h, w, 3) of the images in the buffer."""
        for slot in self.slots:
            count = slot.height * slot.width * 3
            yield self.buffer[slot.offset : slot.offset + count].view(slot.height, slot.width, 3)

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, some: slice) -> Self:
        """Return some of the images; the buffer is shared."""
        colors = None if self.colors is None else self.colors[some]
        return replace(self, table=self.table[some], slots=self.slots[some], colors=colors)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """List the (h, w) that each is to have."""
        return [(slot.new_height, slot.new_width) for slot in self.slots]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        colors = None if self.colors is None else move(self.colors)
        return replace(self, buffer=move(self.buffer), table=move(self.table), colors=colors)


def resize_normalize_pad_ref(
    images: PackedImages,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `resize_normalize_pad` in plain torch, which on a CPU rounds after each axis, as Pillow does."""
    device = images.buffer.device
    batch = torch.zeros(len(images), height, width, 3, dtype=dtype, device=device)
    whole, means, deviations = (constants(values, device) for values in ([255], mean, std))
    colors = [None] * len(images) if images.colors is None else images.colors
    for row, image, slot, color in zip(batch, images, images.slots, colors, strict=True):
        size = [slot.new_height, slot.new_width]
        pixels = image.permute(2, 0, 1)
        if size != [slot.height, slot.width]:
            pixels = F.resize(pixels, size, F.InterpolationMode.BILINEAR, antialias=True)
        pixels = (pixels.flip(-1) if slot.hflip else pixels).permute(1, 2, 0)  # (h, w, 3)
        at_a_time = max(1, CACHED_ENTRIES // (3 * size[1])) if device.type == "cpu" else size[0]
        for some in range(0, size[0], at_a_time):
            levels = pixels[some : some + at_a_time].float()
            if color is not None:
                levels = recolored(levels, color)
            levels.div_(whole).sub_(means).div_(deviations)
            row[some : some + len(levels), : size[1]] = levels
    return batch.permute(0, 3, 1, 2)


CACHED_ENTRIES = 2**17
"""Numbers that plain torch on a CPU normalises at a time: half a megabyte, which stays in the cache."""


def recolored(levels: Tensor, color: Tensor) -> Tensor:
    """Map levels (h, w, 3) by a color matrix (3, 4), and clamp them; no product of matrices, which could round more."""
    mapped = color[:, 3].expand_as(levels)
    for channel in range(3):
        mapped = torch.addcmul(mapped, levels[..., channel, None], color[:, channel])
    return mapped.clamp_(0, 255)


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """Make (C,) float32 on the device itself: a copy from the host would wait, and could not be captured.

    On a GPU torch divides exactly by a tensor alone.
    """
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


@triton.jit
def _weight(seen, center, reach):
    """Weigh a row or column `seen` for a pixel with its middle at `center`, before weights are made to sum to 1."""
    return tl.maximum(1.0 - tl.abs(seen.to(tl.float32) + 0.5 - center) / reach, 0.0)


@triton.jit
def _level(buffer, inside, row, column, channel, old_h, old_w, h, w, ROWS: tl.constexpr, ENTRIES: tl.constexpr):
    """Resample `channel` of the image at `buffer`, to whole levels (ROWS, ENTRIES)."""
    down, across = old_h.to(tl.float32) / h, old_w.to(tl.float32) / w
    reach_y, reach_x = tl.maximum(down, 1.0), tl.maximum(across, 1.0)
    middle_y, middle_x = (row + 0.5) * down, (column + 0.5) * across
    first_y = tl.maximum((middle_y - reach_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((middle_x - reach_x + 0.5).to(tl.int32), 0)
    total = tl.zeros((ROWS, ENTRIES), tl.float32)
    weight_y, weight_x = tl.zeros((ROWS, 1), tl.float32), tl.zeros((1, ENTRIES), tl.float32)
    for step_y in range(0, tl.ceil(reach_y).to(tl.int32) * 2 + 1):
        y = first_y + step_y
        p = tl.where(y < old_h, _weight(y, middle_y, reach_y), 0.0)
        weight_y += p
        along = tl.zeros((ROWS, ENTRIES), tl.float32)
        weight_x = tl.zeros((1, ENTRIES), tl.float32)
        for step_x in range(0, tl.ceil(reach_x).to(tl.int32) * 2 + 1):
            x = first_x + step_x
            q = tl.where(x < old_w, _weight(x, middle_x, reach_x), 0.0)
            weight_x += q
            seen = inside & (p > 0) & (q > 0)
            along += q * tl.load(buffer + (y * old_w + x) * 3 + channel, mask=seen, other=0).to(tl.float32)
        total += p * along
    return tl.floor(total / (weight_y * weight_x) + 0.5)


@triton.jit(do_not_specialize=["height", "width"])  # they differ from batch to batch, and nothing is gained by knowing
def _resize_normalize_pad_kernel(
    buffer,  # (n,) uint8
    table,  # (B, 6) int64
    colors,  # (B, 3, 4), or None
    batch,  # (B, height, width, 3)
    height,
    width,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    image = tl.program_id(2)
    table += image * 6
    buffer += tl.load(table)
    old_h, old_w = tl.load(table + 1).to(tl.int32), tl.load(table + 2).to(tl.int32)
    h, w = tl.load(table + 3).to(tl.int32), tl.load(table + 4).to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)[None, :]
    inside = (row < h) & (entry < w * 3)
    channel = entry % 3
    column = entry // 3
    column = tl.where(tl.load(table + 5) == 1, w - 1 - column, column)

    if colors is None:
        level = _level(buffer, inside, row, column, channel, old_h, old_w, h, w, ROWS, ENTRIES)
    else:
        colors += image * 12 + channel * 4
        level = tl.load(colors + 3) + tl.zeros((ROWS, ENTRIES), tl.float32)
        for source in tl.static_range(3):
            seen = _level(buffer, inside, row, column, source, old_h, old_w, h, w, ROWS, ENTRIES)
            level += tl.load(colors + source) * seen
        level = tl.minimum(tl.maximum(level, 0.0), 255.0)

    # x / 255, correctly rounded for all 256 levels, whether or not the compiler fuses: x * 257 / 65536 is exact, and
    # the rest so small that its own error does not show; two instructions, where a division takes a dozen
    value = level * (257 / 65536) + level * (1 / 255 - 257 / 65536)
    value -= tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    value = tl.div_rn(value, tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b)))
    value = tl.where(inside, value, 0.0)
    at = (image.to(tl.int64) * height + row) * (width * 3) + entry
    tl.store(batch + at, value.to(batch.dtype.element_ty), mask=(row < height) & (entry < width * 3))


def _forward(
    buffer: Tensor,
    table: Tensor,
    colors: Tensor | None,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Compute a batch (B, 3, H, W) in channels-last memory from the tensors of `PackedImages`."""
    colors = None if colors is None else colors.contiguous()
    batch = _empty(table, height, width, dtype)
    grid = (cdiv(width * 3, ENTRIES), cdiv(height, ROWS), len(table))
    arguments = (buffer, table, colors, batch, height, width, *mean, *std)
    launch(_resize_normalize_pad_kernel, grid, *arguments, ROWS=ROWS, ENTRIES=ENTRIES, num_warps=4)
    return batch


def _empty(table: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Allocate the batch."""
    shape = len(table), 3, height, width
    return torch.empty(shape, dtype=dtype, device=table.device, memory_format=torch.channels_last)


forward_op = torch.library.custom_op("detr_kernels::resize_normalize_pad", _forward, mutates_args=())


@forward_op.register_fake
def _(buffer, table, colors, height, width, mean, std, dtype):
    return _empty(table, height, width, dtype)


def _specimens() -> None:
    buffer, table = meta(IMAGES * 480 * 640 * 3, dtype=torch.uint8), meta(IMAGES, 6, dtype=torch.int64)
    for colors in (None, meta(IMAGES, 3, 4, dtype=torch.float32)):
        for dtype in (torch.bfloat16, torch.float32):
            _forward(buffer, table, colors, 800, 1066, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype)


OPERATION = Operation(
    "preprocessing", (TRITON, REFERENCE), flop={"resize_normalize_pad": zero_flop}, specimens=_specimens
)


def resize_normalize_pad(
    images: PackedImages,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Resize packed images into one normalised batch (B, 3, height, width), padded right and below.

    The batch is in channels-last memory, in `dtype` (normalised in float32, then rounded) and exactly 0 where padded.
    Resized pixels are rounded to whole levels once; plain torch on a CPU rounds after each axis, and may differ by a
    level. Then the images' `colors`, if they have any, map the levels. Stores are widest where `width` is a multiple
    of 16. No gradient; nothing waits for the device. Raises ValueError for what does not fit and RuntimeError where
    Triton is asked for and cannot run.
    """
    if dtype not in DTYPES or len(mean) != 3 or len(std) != 3:
        raise ValueError(f"dtype must be of {DTYPES}, mean and std of 3 values; got {dtype}, {mean}, {std}")
    if too_large := [size for size in images.sizes if size[0] > height or size[1] > width]:
        raise ValueError(f"images larger than the batch's ({height}, {width}): {too_large}")
    if OPERATION.choose(Facts(images.buffer.device), backend).backend == "ref":
        return resize_normalize_pad_ref(images, height, width, mean, std, dtype)
    return forward_op(images.buffer, images.table, images.colors, height, width, list(mean), list(std), dtype)
