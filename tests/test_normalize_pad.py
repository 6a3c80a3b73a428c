"""Normalisation and padding in one pass: the numbers of today's pipeline, whichever way the images come in."""

import pytest
import torch
from detr_kernels import PackedImages, normalize_pad, normalize_pad_ref
from detr_kernels.pixels import forward_op
from detr_profiling.comparison.closeness import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast.data.batching import collate, normalize
from detr_fast.data.sample import Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# ragged, with the smallest image; one image, an entry wider than a block of 512 and a row higher than its 4 rows;
# nothing to pad; two blocks across and three down, of which one image fills none and another all; no pixels in one
SHAPES = [
    [(5, 7), (9, 4), (1, 1)],
    [(5, 171)],
    [(6, 8), (6, 8)],
    [(2, 3), (11, 200), (4, 171)],
    [(0, 0), (3, 2)],
]
FLOORS = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 0.0}
"""Of the largest magnitude: no floor, but where Triton's interpreter cuts bfloat16 off instead of rounding it."""


def make_images(shapes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator) for shape in shapes]
    return [image.to(DEVICE) for image in images]


def largest(images: list[Tensor]) -> tuple[int, int]:
    return max(image.shape[0] for image in images), max(image.shape[1] for image in images)


def fused(images: list[Tensor] | PackedImages, height: int, width: int, **options: object) -> tuple[Tensor, Tensor]:
    return normalize_pad(images, height, width, MEAN, STD, backend="triton", **options)  # type: ignore[arg-type]


def todays(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Batch and sizes as the data pipeline makes them, on the CPU."""
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    batch = collate([Sample(image.cpu().permute(2, 0, 1), *none, 1, (1, 1)) for image in images])
    return normalize(batch, MEAN, STD, channels_last=True)[0], batch.sizes


def padded(images: list[Tensor], height: int, width: int, padding: int) -> PackedImages:
    """The images in a batch that holds `padding` beside them."""
    batch = torch.full((len(images), height, width, 3), padding, dtype=torch.uint8, device=DEVICE)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    sizes = torch.tensor([image.shape[:2] for image in images], device=DEVICE)
    return PackedImages.of_padded(batch.permute(0, 3, 1, 2), sizes)


def strided(images: list[Tensor], gap: int = 2) -> PackedImages:
    """The images in reverse order, with `gap` pixels of 255 after each row and 5 such bytes before each image."""
    parts, offsets, end = [], [0] * len(images), 0
    for index in reversed(range(len(images))):
        rows = torch.nn.functional.pad(images[index], (0, 0, 0, gap), value=255).flatten()
        parts += [rows.new_full((5,), 255), rows]
        offsets[index] = end + 5
        end += 5 + len(rows)
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int32, device=DEVICE)
    return PackedImages(torch.cat(parts), torch.tensor(offsets, device=DEVICE), sizes, sizes[:, 1] + gap)


def assert_equal(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for value, other in zip(result, expected, strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value.cpu(), other.cpu())


@pytest.mark.parametrize("shapes", SHAPES)
def test_float32_is_todays_to_the_last_bit(shapes: list[tuple[int, int]]) -> None:
    images = make_images(shapes)
    batch, sizes = fused(images, *largest(images))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert_equal((batch, sizes), todays(images))


@pytest.mark.parametrize("mean, std", [(MEAN, STD), ((0.0, 0.5, 1.0), (1.0, 0.5, 1 / 3)), ((0.1, 0.7, 0.3), (3, 7, 9))])
def test_every_byte_in_every_channel_is_torchs_to_the_last_bit(mean: tuple, std: tuple) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    batch, _ = normalize_pad([image.to(DEVICE)], 16, 16, mean, std, backend="triton")
    plain, (m, s) = image.permute(2, 0, 1).float() / 255, (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    assert torch.equal(batch[0].cpu(), (plain - m) / s)


@pytest.mark.parametrize("dtype", FLOORS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_as_exact_as_eager(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    images = make_images(shapes)
    batch, sizes = fused(images, *largest(images), dtype=dtype)
    plain, plain_sizes = normalize_pad_ref(images, *largest(images), MEAN, STD, dtype)
    assert batch.dtype == plain.dtype == dtype
    assert torch.equal(sizes, plain_sizes)
    oracle = torch.zeros(plain.shape, dtype=torch.float64, device=DEVICE)
    mean, std = (torch.tensor(each, dtype=torch.float64, device=DEVICE) for each in (MEAN, STD))
    for row, image in zip(oracle, images, strict=True):
        row[:, : image.shape[0], : image.shape[1]] = ((image.double() / 255 - mean) / std).permute(2, 0, 1)
    assert_close(batch, oracle, plain, FLOORS[dtype] * oracle.abs().max().item())
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        assert torch.equal(batch, plain)


@pytest.mark.parametrize("backend", ["triton", "ref"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_three_ways_in_and_whatever_lies_beside_the_images(shapes: list[tuple[int, int]], backend: str) -> None:
    images = make_images(shapes)
    height, width = largest(images)
    ways = [PackedImages.of_list(images), strided(images), padded(images, height, width, 255)]
    for packed in ways:
        assert_equal(normalize_pad(packed, height, width, MEAN, STD, backend=backend), todays(images))


@pytest.mark.parametrize("backend", ["triton", "ref"])
def test_a_batch_larger_than_its_images(backend: str) -> None:
    images = make_images([(5, 7), (9, 4)])
    expected = torch.zeros(2, 3, 14, 190)
    expected[:, :, :9, :7], sizes = todays(images)
    for way in (images, strided(images), padded(images, 9, 7, 255)):
        assert_equal(normalize_pad(way, 14, 190, MEAN, STD, backend=backend), (expected, sizes))


@pytest.mark.parametrize("backend", ["triton", "ref"])
def test_packed_images_larger_than_the_batch_are_cropped(backend: str) -> None:
    images = make_images([(9, 20), (3, 30), (12, 2)])
    expected = todays([image[:6, :11] for image in images])
    for packed in (PackedImages.of_list(images), strided(images), padded(images, 12, 30, 255)):
        assert_equal(normalize_pad(packed, 6, 11, MEAN, STD, backend=backend), expected)


@pytest.mark.parametrize("backend", ["triton", "ref"])
def test_nothing_is_read_beyond_the_buffer(backend: str) -> None:
    (image,) = make_images([(4, 6)])
    guarded = torch.cat([image.new_full((90,), 255), image.flatten(), image.new_full((9000,), 255)])
    buffer = guarded[90:-9000]
    # all of it; rows that end beyond it, one of them in the middle of a pixel; before it; behind it; a negative size
    offsets = torch.tensor([0, 31, -18, 500, 0], device=DEVICE)
    sizes = torch.tensor([(4, 6), (8, 6), (4, 6), (4, 6), (-1, 6)], device=DEVICE)
    packed = PackedImages(buffer, offsets, sizes, torch.full((5,), 6, device=DEVICE))
    batch, lengths = normalize_pad(packed, 5, 7, MEAN, STD, backend=backend)  # type: ignore[arg-type]
    expected = torch.zeros(5, 5, 7, 3)
    normed = (image.cpu().float() / 255).flatten()
    for index, start, rows in ((0, 0, 4), (1, 31, 5), (2, -18, 4)):
        for row in range(rows):
            begin = start + row * 18
            held = normed[begin : begin + 18] if begin >= 0 else normed[:0]
            flat = (held - torch.tensor(MEAN).repeat(6)[: len(held)]) / torch.tensor(STD).repeat(6)[: len(held)]
            expected[index, row].view(-1)[: len(held)] = flat
    assert torch.equal(batch.cpu().permute(0, 2, 3, 1), expected)
    assert lengths.tolist() == [[4, 6], [5, 6], [4, 6], [4, 6], [0, 6]]


def test_views_that_are_not_contiguous() -> None:
    images = [image[1::2, ::3].transpose(0, 1) for image in make_images([(10, 21), (8, 33)])]
    assert not images[0].is_contiguous()
    assert_equal(fused(images, *largest(images)), todays(images))


def test_a_padded_batch_is_not_copied() -> None:
    batch = make_images([(2 * 6, 8)])[0].view(2, 6, 8, 3).permute(0, 3, 1, 2)
    packed = PackedImages.of_padded(batch, torch.tensor([(6, 8), (2, 3)], device=DEVICE))
    assert packed.buffer.data_ptr() == batch.data_ptr()


def test_what_does_not_fit_is_refused() -> None:
    images = make_images([(5, 7), (9, 4)])
    with pytest.raises(ValueError, match="no images"):
        fused([], 9, 7)
    with pytest.raises(ValueError, match=r"larger than the batch's \(8, 7\).*\(9, 4, 3\)"):
        fused(images, 8, 7)
    with pytest.raises(ValueError, match=r"\(3, 9, 4\)"):
        fused([images[0], images[1].permute(2, 0, 1)], 9, 7)
    with pytest.raises(ValueError, match="float32"):
        fused([images[0].float()], 9, 7)
    with pytest.raises(ValueError, match="float64"):
        fused(images, 9, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least 1"):
        fused(strided(images), 0, 7)
    with pytest.raises(ValueError, match="3 values"):
        normalize_pad(images, 9, 7, MEAN[:2], STD)
    with pytest.raises(ValueError, match="channels-last"):
        PackedImages.of_padded(torch.zeros(2, 3, 9, 7, dtype=torch.uint8), torch.zeros(2, 2))
    packed = strided(images)
    with pytest.raises(ValueError, match=r"\(1,\), \(2, 2\), \(2,\)"):
        PackedImages(packed.buffer, packed.offsets[:1], packed.sizes, packed.row_pixels)
    with pytest.raises(ValueError, match="contiguous uint8"):
        PackedImages(packed.buffer[::2], packed.offsets, packed.sizes, packed.row_pixels)
    with pytest.raises(ValueError, match="int64 on meta"):
        PackedImages(packed.buffer, packed.offsets.to("meta"), packed.sizes, packed.row_pixels)
    with pytest.raises(ValueError, match="float32 on"):
        PackedImages(packed.buffer, packed.offsets, packed.sizes.float(), packed.row_pixels)


def test_shapes_dtype_and_layout_are_known_without_a_gpu() -> None:
    with FakeTensorMode():
        images = [torch.empty(shape, dtype=torch.uint8, device="cuda") for shape in ((5, 7, 3), (9, 4, 3))]
        packed = PackedImages.of_list(images)
        fields = packed.buffer, packed.offsets, packed.sizes, packed.row_pixels
        by_kernel = forward_op(*fields, 9, 7, MEAN, STD, torch.bfloat16)
        for batch, sizes in (by_kernel, normalize_pad(images, 9, 7, MEAN, STD, torch.bfloat16)):
            assert (batch.device.type, batch.dtype, batch.shape) == ("cuda", torch.bfloat16, (2, 3, 9, 7))
            assert batch.stride() == (9 * 7 * 3, 1, 7 * 3, 3)
            assert (sizes.device.type, sizes.dtype, sizes.shape) == ("cuda", torch.int64, (2, 2))


def test_compiles_without_a_graph_break() -> None:
    def halves(*fields: Tensor) -> tuple[Tensor, Tensor]:
        batch, sizes = fused(PackedImages(*fields), 9, 7)
        return batch / 2, sizes

    def halves_of_padded(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        batch, sizes = fused(PackedImages.of_padded(images, sizes), 9, 7)
        return batch / 2, sizes

    images = make_images([(5, 7), (9, 4)])
    batch, sizes = todays(images)
    packed, full = strided(images), padded(images, 9, 7, 255)
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    fields = packed.buffer, packed.offsets, packed.sizes, packed.row_pixels
    assert_equal(compiled(*fields), (batch / 2, sizes))
    compiled = torch.compile(halves_of_padded, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(full.buffer.permute(0, 3, 1, 2), full.sizes), (batch / 2, sizes))


def test_the_operator_is_registered_as_torch_asks() -> None:
    for packed in (strided(make_images([(5, 7), (9, 4)])), PackedImages.of_list(make_images([(1, 1)]))):
        fields = packed.buffer, packed.offsets, packed.sizes, packed.row_pixels
        torch.library.opcheck(forward_op, (*fields, 9, 7, MEAN, STD, torch.bfloat16))
