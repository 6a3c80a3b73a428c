"""Resizing, normalisation and padding in one pass: Pillow's pixels to a level, and torch's numbers to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detr_kernels import PackedImages, resize_normalize_pad, resize_normalize_pad_ref
from detr_kernels.preprocessing.resize import forward_op
from detr_profiling.comparison.closeness import assert_close
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.kernel_inputs import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# ragged, with the smallest image; one image, an entry wider than a block of 512 and a row higher than its 4 rows;
# nothing to pad; two blocks across and three down, of which one image fills none and another all
SHAPES = [[(5, 7), (9, 4), (1, 1)], [(5, 171)], [(6, 8), (6, 8)], [(2, 3), (11, 200), (4, 171)]]
# enlarged, by a whole number and not; shrunk a little, to a third (an odd number of taps) and to one pixel; one way
# enlarged and the other shrunk; the same; one pixel enlarged
RESIZED = [
    ((12, 16), (24, 40)),
    ((12, 16), (11, 15)),
    ((30, 45), (10, 15)),
    ((7, 9), (1, 1)),
    ((40, 6), (9, 33)),
    ((10, 14), (10, 14)),
    ((1, 1), (5, 3)),
]
TOLERANCES = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 0.0}
"""Of the largest magnitude: no floor, but where Triton's interpreter cuts bfloat16 off instead of rounding it."""
LEVEL = 1 / 255 / min(STD)


def make_images(shapes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator) for shape in shapes]


def largest(shapes: list[tuple[int, int]]) -> tuple[int, int]:
    heights, widths = zip(*shapes, strict=True)
    return max(heights), max(widths)


def run(packed: PackedImages, height: int, width: int, backend: str = "triton", **options: object) -> Tensor:
    return resize_normalize_pad(packed.to(DEVICE), height, width, MEAN, STD, backend=backend, **options)


def exact(packed: PackedImages, height: int, width: int) -> Tensor:
    """(B, 3, H, W) in float64, resized without any rounding, normalised, padded."""
    batch = torch.zeros(len(packed), 3, height, width, dtype=torch.float64)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    for row, image, place in zip(batch, packed, packed.slots, strict=True):
        size = place.new_height, place.new_width
        pixels = image.permute(2, 0, 1)[None].double()
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
        row[:, : size[0], : size[1]] = ((pixels.flip(-1) if place.hflip else pixels) / 255 - mean) / std
    return batch


@pytest.mark.parametrize("backend", ["triton", "ref"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_an_image_that_keeps_its_size_keeps_its_numbers(shapes: list[tuple[int, int]], backend: str) -> None:
    images = make_images(shapes)
    height, width = largest(shapes)
    batch = run(PackedImages.from_list(images), height, width, backend)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    expected = torch.zeros(len(images), 3, height, width)
    for row, image in zip(expected, images, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = (image.permute(2, 0, 1).float() / 255 - mean) / std
    assert torch.equal(batch.cpu(), expected)


@pytest.mark.parametrize("mean, std", [(MEAN, STD), ((0.0, 0.5, 1.0), (1.0, 0.5, 1 / 3)), ((0.1, 0.7, 0.3), (3, 7, 9))])
def test_every_level_in_every_channel_is_torchs_to_the_last_bit(mean: tuple, std: tuple) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    packed = PackedImages.from_list([image]).to(DEVICE)
    batch = resize_normalize_pad(packed, 16, 16, mean, std, backend="triton")
    plain, (m, s) = image.permute(2, 0, 1).float() / 255, (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    assert torch.equal(batch[0].cpu(), (plain - m) / s)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shape, size", RESIZED)
def test_a_resized_image_is_exact_to_half_a_level(
    shape: tuple[int, int], size: tuple[int, int], mirrored: bool, dtype: torch.dtype
) -> None:
    images = make_images([shape, (3, 2)])
    packed = PackedImages.from_list(images, [size, (3, 2)], [mirrored, False])
    height, width = largest([size, (4, 5)])
    batch, reference = run(packed, height, width, dtype=dtype).cpu().double(), exact(packed, height, width)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * reference.abs().max().item()
    assert (batch - reference).abs().max() <= 0.501 * LEVEL + rounding
    inside = torch.zeros(2, 1, height, width, dtype=torch.bool)
    inside[0, :, : size[0], : size[1]] = inside[1, :, :3, :2] = True
    assert torch.equal(batch.masked_select(~inside), torch.zeros(int((~inside).sum()) * 3, dtype=torch.float64))


@pytest.mark.parametrize("shape, size", RESIZED)
def test_plain_torch_and_pillow_are_within_a_level(shape: tuple[int, int], size: tuple[int, int]) -> None:
    (image,) = make_images([shape])
    packed = PackedImages.from_list([image], [size])
    plain, fused = (run(packed, *size, backend).cpu() for backend in ("ref", "triton"))
    resized = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    pillow = resize_normalize_pad_ref(PackedImages.from_list([torch.from_numpy(np.array(resized))]), *size, MEAN, STD)
    for ours in (plain, fused):
        assert (ours - pillow).abs().max() <= 1.001 * LEVEL
        assert (ours - pillow).abs().mean() <= 0.5 * LEVEL


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_as_exact_as_eager(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    packed, (height, width) = PackedImages.from_list(make_images(shapes)), largest(shapes)
    batch, plain = (run(packed, height, width, form, dtype=dtype).cpu() for form in ("triton", "ref"))
    assert batch.dtype == plain.dtype == dtype
    oracle = exact(packed, height, width)
    assert_close(batch, oracle, plain, TOLERANCES[dtype] * oracle.abs().max().item())
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        assert torch.equal(batch, plain)


@pytest.mark.parametrize("backend", ["triton", "ref"])
def test_a_batch_larger_than_its_images_and_bytes_that_are_none_of_theirs(backend: str) -> None:
    packed = PackedImages.from_list(make_images([(5, 7), (9, 4)]), [(10, 7), (9, 8)])
    expected = run(packed, 10, 8, backend)
    shifted = [place._replace(offset=place.offset + 90) for place in packed.slots]
    buffer = torch.cat([packed.buffer.new_full((90,), 255), packed.buffer, packed.buffer.new_full((900,), 255)])
    wide = run(PackedImages(buffer, torch.tensor(shifted), tuple(shifted)), 14, 190, backend)
    assert torch.equal(wide[:, :, :10, :8], expected)
    assert wide[:, :, 10:].abs().sum() == 0 and wide[:, :, :, 8:].abs().sum() == 0


@pytest.mark.parametrize("backend", ["triton", "ref"])
@pytest.mark.parametrize("shape, size", RESIZED)
def test_levels_are_mapped_and_clamped_between_resizing_and_normalising(
    shape: tuple[int, int], size: tuple[int, int], backend: str
) -> None:
    """Two images, each with its own colors, most of whose results pass 0 or 255; and padding stays 0."""
    colors = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 1, 1, 90])
    plain = PackedImages.from_list(make_images([shape, (3, 2)]), [size, (3, 2)], [True, False])
    packed, (height, width) = replace(plain, colors=colors), largest([size, (4, 5)])
    levels = resize_normalize_pad(plain.to(DEVICE), height, width, (0,) * 3, (1 / 255,) * 3, backend=backend).cpu()
    mapped = (
        torch.einsum("bij,bjhw->bihw", colors[..., :3].double(), levels.double().round()) + colors[..., 3, None, None]
    )
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    expected = (mapped.clamp(0, 255) / 255 - mean) / std
    inside = torch.zeros(2, 1, height, width, dtype=torch.bool)
    inside[0, :, : size[0], : size[1]] = inside[1, :, :3, :2] = True
    found = run(packed, height, width, backend).cpu()
    torch.testing.assert_close(found, torch.where(inside, expected, 0.0).float(), rtol=1e-5, atol=1e-5)
    alone = run(packed[1:], height, width, backend).cpu()
    assert torch.equal(alone, found[1:])


@pytest.mark.parametrize("backend", ["triton", "ref"])
def test_a_map_that_changes_nothing_changes_no_bit(backend: str) -> None:
    packed = PackedImages.from_list(make_images([(5, 7), (9, 4)]), [(10, 7), (9, 8)])
    same = replace(packed, colors=torch.eye(3, 4).expand(2, 3, 4))
    assert torch.equal(run(same, 10, 8, backend), run(packed, 10, 8, backend))


def test_views_that_are_not_contiguous() -> None:
    images = [image[1::2, ::3].transpose(0, 1) for image in make_images([(10, 21), (8, 33)])]
    assert not images[0].is_contiguous()
    packed, copied = PackedImages.from_list(images), PackedImages.from_list([image.contiguous() for image in images])
    assert torch.equal(run(packed, 11, 5), run(copied, 11, 5))
    assert all(torch.equal(one, image) for one, image in zip(packed, images, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    images = make_images([(5, 7), (9, 4)])
    packed = PackedImages.from_list(images)
    with pytest.raises(ValueError, match="no images"):
        PackedImages.from_list([])
    with pytest.raises(ValueError, match=r"larger than the batch's \(8, 7\).*\(9, 4\)"):
        run(packed, 8, 7)
    with pytest.raises(ValueError, match=r"\(3, 9, 4\)"):
        PackedImages.from_list([images[0], images[1].permute(2, 0, 1)])
    with pytest.raises(ValueError, match="float32"):
        PackedImages.from_list([images[0].float()])
    with pytest.raises(ValueError, match="no pixels"):
        PackedImages.from_list([images[0][:0]])
    with pytest.raises(ValueError, match="at least 1 x 1"):
        PackedImages.from_list(images, [(5, 7), (0, 4)])
    with pytest.raises(ValueError, match="float64"):
        run(packed, 9, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="3 values"):
        resize_normalize_pad(packed, 9, 7, MEAN[:2], STD)
    with pytest.raises(ValueError, match="contiguous uint8"):
        PackedImages(packed.buffer[::2], packed.table, packed.slots)
    with pytest.raises(ValueError, match="table must be"):
        PackedImages(packed.buffer, packed.table[:1], packed.slots)
    with pytest.raises(ValueError, match="colors must be"):
        replace(packed, colors=torch.zeros(2, 4, 3))


def test_shapes_dtype_and_layout_are_known_without_a_gpu() -> None:
    packed = PackedImages.from_list(make_images([(5, 7), (9, 4)]), [(10, 7), (9, 8)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        buffer, table = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (packed.buffer, packed.table))
        fake = PackedImages(buffer, table, packed.slots)
        by_kernel = forward_op(buffer, table, None, 10, 8, MEAN, STD, torch.bfloat16)
        for batch in (by_kernel, resize_normalize_pad(fake, 10, 8, MEAN, STD, torch.bfloat16)):
            assert (batch.device.type, batch.dtype, batch.shape) == ("cuda", torch.bfloat16, (2, 3, 10, 8))
            assert batch.stride() == (10 * 8 * 3, 1, 8 * 3, 3)
