"""Images of different size to one normalised, padded, channels-last batch, in one pass over memory.

    batch[b, c, y, x] = (image_b[y, x, c] / 255 - mean[c]) / std[c]   inside image b, 0 where it is padded

Eager code writes the batch five times; here each byte is read once and each number written once. Every operation
rounds as IEEE 754 asks, so that float32 is, to the last bit and on any device, what torch computes on the CPU, and the
official DETR (Carion et al. 2020) with it. (On a GPU torch divides by a number by multiplying with its reciprocal:
x / 255 then errs in the last bit for 126 of the 256 values.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_kernels.dispatch import DTYPES, Backend, cdiv, choose_backend, launch
from detr_kernels.language import tl, triton

ROWS, ENTRIES = 4, 512
"""Rows of how many entries (3 a pixel) a program makes: 16 entries a thread, all of whose loads are under way at once;
512 leave a ninth of the last block idle at 1066 pixels, 1024 would leave a quarter."""


@dataclass(frozen=True, eq=False)
class PackedImages:
    """Images of different size in one buffer, each row by row, three bytes a pixel."""

    buffer: Tensor
    """uint8 (n,); or (B, height, width, 3), as `of_padded` makes it, where image b begins at the corner of its own."""
    offsets: Tensor
    """(B,) int64, the byte at which each image begins"""
    sizes: Tensor
    """(B, 2) int32 or int64, each image's (h, w)"""
    row_pixels: Tensor
    """(B,) int32 or int64, pixels from one row to the next: w, or more where rows are padded"""

    def __post_init__(self) -> None:
        count = len(self.offsets)
        shapes = [tuple(each.shape) for each in (self.buffer, self.offsets, self.sizes, self.row_pixels)]
        if shapes[1:] != [(count,), (count, 2), (count,)]:
            raise ValueError(f"offsets must be (B,), sizes (B, 2) and row_pixels (B,); got {shapes[1:]}")
        if len(shapes[0]) != 1 and (len(shapes[0]) != 4 or shapes[0][0] != count or shapes[0][3] != 3):
            raise ValueError(f"buffer must be (n,) or (B, height, width, 3) with B = {count}; got {shapes[0]}")
        if self.buffer.dtype != torch.uint8 or not self.buffer.is_contiguous():
            raise ValueError(f"buffer must be contiguous uint8, not {self.buffer.dtype} of {self.buffer.stride()}")
        for each in (self.offsets, self.sizes, self.row_pixels):
            if each.dtype not in (torch.int32, torch.int64) or each.device != self.buffer.device:
                got = f"{each.dtype} on {each.device}"
                raise ValueError(f"offsets, sizes and row_pixels must be integers on {self.buffer.device}; got {got}")

    @classmethod
    def of_list(cls, images: Sequence[Tensor]) -> Self:
        """Of at least one uint8 (h, w, 3) on one device, contiguous or not; copied together there.

        Nothing waits for the device. Raises ValueError for anything else.
        """
        check_list(images)
        lengths = [image.numel() for image in images]
        sizes = [side for image in images for side in image.shape[:2]]
        numbers = [0, *accumulate(lengths[:-1]), *sizes, *(image.shape[1] for image in images)]
        device, count = images[0].device, len(images)
        # CUDA takes up to 64 KiB from any host memory without waiting (its guide, "asynchronous concurrent execution")
        sent = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
        offsets, both, row_pixels = sent.split([count, 2 * count, count])
        return cls(torch.cat([image.reshape(-1) for image in images]), offsets, both.view(count, 2), row_pixels)

    @classmethod
    def of_padded(cls, images: Tensor, sizes: Tensor) -> Self:
        """Of uint8 (B, 3, height, width) in channels-last memory, which is not copied, and sizes (B, 2).

        Raises ValueError for other memory or shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.permute(0, 2, 3, 1).is_contiguous():
            layout = f"{tuple(images.shape)} of strides {images.stride()}"
            raise ValueError(f"images must be (B, 3, height, width) in channels-last memory; got {layout}")
        count, _, height, width = images.shape
        offsets = torch.arange(count, device=images.device) * (height * width * 3)
        row_pixels = torch.full((count,), width, dtype=torch.int64, device=images.device)
        return cls(images.permute(0, 2, 3, 1), offsets, sizes, row_pixels)


def check_list(images: Sequence[Tensor]) -> None:
    """Raises ValueError unless `images` are at least one uint8 (h, w, 3), all on one device."""
    if not images:
        raise ValueError("no images: a batch has at least one")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.device != images[0].device:
            got = f"{image.dtype} {tuple(image.shape)} on {image.device}"
            raise ValueError(f"images must be uint8 (h, w, 3) on {images[0].device}; got {got}")


def normalize_pad_ref(
    images: Sequence[Tensor] | PackedImages,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    packed = images if isinstance(images, PackedImages) else _collated(images, height, width)
    device = packed.buffer.device
    sizes = torch.stack([packed.sizes[:, 0].clamp(0, height), packed.sizes[:, 1].clamp(0, width)], 1).long()
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside = ((row < sizes[:, 0, None, None]) & (column < sizes[:, 1, None, None]))[..., None]  # (B, H, W, 1)
    if packed.buffer.ndim == 4:
        own_height, own_width = packed.buffer.shape[1:3]
        pixels = packed.buffer
        if (own_height, own_width) != (height, width):
            pixels = F.pad(pixels, (0, 0, 0, width - own_width, 0, height - own_height))
    else:
        start = packed.offsets[:, None, None] + row * packed.row_pixels[:, None, None] * 3  # (B, H, 1)
        byte = start[..., None] + (column[:, None] * 3 + torch.arange(3, device=device))  # (B, H, W, 3)
        inside = inside & (start[..., None] >= 0) & (byte < packed.buffer.numel())
        # one byte more, so that there is one to take where nothing is inside
        pixels = F.pad(packed.buffer, (0, 1))[torch.where(inside, byte, packed.buffer.numel())]
    values = pixels.float().div_(constants([255], device))
    values.sub_(constants(mean, device)).div_(constants(std, device)).masked_fill_(~inside, 0)
    return values.to(dtype).permute(0, 3, 1, 2), sizes


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """(C,) float32, which the device writes itself: a copy from the host would wait, and could not be captured.

    On a GPU torch divides exactly by a tensor alone.
    """
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def _collated(images: Sequence[Tensor], height: int, width: int) -> PackedImages:
    """A list as one padded batch."""
    check_list(images)
    padded = images[0].new_zeros(len(images), height, width, 3)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    sizes = torch.tensor([image.shape[:2] for image in images]).to(padded.device, non_blocking=True)
    return PackedImages.of_padded(padded.permute(0, 3, 1, 2), sizes)


@triton.jit(do_not_specialize=["n", "height"])  # they differ from batch to batch, and nothing is gained by knowing them
def _normalize_pad_kernel(
    buffer,  # (n,) uint8
    offsets,  # (B,) int64
    sizes,  # (B, 2)
    row_pixels,  # (B,)
    batch,  # (B, height, width, 3)
    lengths,  # (B, 2) int64
    n,
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
    h = tl.minimum(tl.maximum(tl.load(sizes + image * 2), 0), height).to(tl.int32)
    w = tl.minimum(tl.maximum(tl.load(sizes + image * 2 + 1), 0), width).to(tl.int32)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(lengths + image * 2, h.to(tl.int64))
        tl.store(lengths + image * 2 + 1, w.to(tl.int64))

    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)[None, :]
    start = tl.load(offsets + image) + row * tl.load(row_pixels + image).to(tl.int64) * 3
    # how many entries of each row are read: those inside the image, and whatever was promised, inside the buffer
    held = tl.maximum(tl.minimum(n - start, w * 3), 0).to(tl.int32)
    held = tl.where((row < h) & (start >= 0), held, 0)
    inside = entry < held
    pixel = tl.load(buffer + start + entry, mask=inside, other=0).to(tl.float32)

    # x / 255, correctly rounded for all 256 bytes, whether or not the compiler fuses: x * 257 / 65536 is exact, and the
    # rest so small that its own error does not show; two instructions, where a division takes a dozen
    value = pixel * (257 / 65536) + pixel * (1 / 255 - 257 / 65536)
    channel = entry.to(tl.uint32) % 3
    value -= tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
    value = tl.div_rn(value, tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b)))
    value = tl.where(inside, value, 0.0)
    at = (image.to(tl.int64) * height + row) * (width * 3) + entry
    tl.store(batch + at, value.to(batch.dtype.element_ty), mask=(row < height) & (entry < width * 3))


def _forward(
    buffer: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    row_pixels: Tensor,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The fields of `PackedImages` -> batch (B, 3, H, W) in channels-last memory, sizes (B, 2) int64 within (H, W)."""
    batch, lengths = _empty(sizes, height, width, dtype)
    grid = (cdiv(width * 3, ENTRIES), cdiv(height, ROWS), len(sizes))
    images = (buffer, offsets.contiguous(), sizes.contiguous(), row_pixels.contiguous())
    arguments = (*images, batch, lengths, buffer.numel(), height, width, *mean, *std)
    launch(_normalize_pad_kernel, grid, *arguments, ROWS=ROWS, ENTRIES=ENTRIES, num_warps=4)
    return batch, lengths


def _empty(sizes: Tensor, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the batch and the sizes."""
    shape = len(sizes), 3, height, width
    batch = torch.empty(shape, dtype=dtype, device=sizes.device, memory_format=torch.channels_last)
    return batch, torch.empty(sizes.shape, dtype=torch.int64, device=sizes.device)


forward_op = torch.library.custom_op("detr_kernels::normalize_pad", _forward, mutates_args=())


@forward_op.register_fake
def _(buffer, offsets, sizes, row_pixels, height, width, mean, std, dtype):
    return _empty(sizes, height, width, dtype)


def normalize_pad(
    images: Sequence[Tensor] | PackedImages,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Images, in a list of uint8 (h, w, 3) or packed, to one normalised batch, padded right and below.

    Returns the batch (B, 3, height, width) in channels-last memory, in `dtype` (normalised in float32, then rounded)
    and exactly 0 where padded, and the sizes (B, 2) int64, (h, w) of each image in it, on their device. A list's images
    may not be larger than the batch; packed ones, whose sizes the host does not know, are cropped, and what they
    promise beyond their buffer counts as padding. Stores are widest where `width` is a multiple of 16. No gradient.
    Raises ValueError for what does not fit and RuntimeError where Triton is asked for and cannot run.
    """
    if dtype not in DTYPES or len(mean) != 3 or len(std) != 3:
        raise ValueError(f"dtype must be of {DTYPES}, mean and std of 3 values; got {dtype}, {mean}, {std}")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1; got {height} and {width}")
    if not isinstance(images, PackedImages):
        check_list(images)
        if too_large := [tuple(i.shape) for i in images if i.shape[0] > height or i.shape[1] > width]:
            raise ValueError(f"images larger than the batch's ({height}, {width}): {too_large}")
    device = images.buffer.device if isinstance(images, PackedImages) else images[0].device
    if choose_backend("normalize_pad", device, backend)[0] == "ref":
        return normalize_pad_ref(images, height, width, mean, std, dtype)
    packed = images if isinstance(images, PackedImages) else PackedImages.of_list(images)
    fields = packed.buffer, packed.offsets, packed.sizes, packed.row_pixels
    batch, sizes = forward_op(*fields, height, width, list(mean), list(std), dtype)
    return batch, sizes
