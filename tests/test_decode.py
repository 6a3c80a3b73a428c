"""Every kind of file that is found in the wild, under the name it is found under (faults 12 to 15 and 17)."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detr_fast.config import UserError
from detr_fast.data import decode
from detr_fast.data.decode import decode_image, faults_named, rgb_pixels
from detr_fast.data.formats import READ_FORMATS
from detr_fast.data.headers import read_header
from detr_fast.data.photographs import why_passed_over
from detr_fast.weights.container import read_container
from detr_fast.weights.files import read_weights_file

RNG = np.random.default_rng(0)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(60) * 4, np.arange(40)[:, None] * 6, 90), axis=-1).astype(np.uint8)
"""(40, 60, 3): survives JPEG compression within a few levels."""


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write(folder: Path, data: bytes, name: str = "image.jpg") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def photograph(**options: object) -> bytes:
    return encoded(Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)), "JPEG", **options)


BROKEN = {
    "truncated": photograph()[:-200],
    "truncated progressive": photograph(progressive=True)[:-200],
    "without its last two bytes": photograph()[:-2],
    "garbage scan": photograph()[:700] + bytes(RNG.integers(0, 255, 900, dtype=np.uint8)) + b"\xff\xd9",
    "garbage CMYK scan": encoded(Image.frombytes("CMYK", (60, 40), RNG.bytes(60 * 40 * 4)), "JPEG")[:900]
    + bytes(RNG.integers(0, 255, 900, dtype=np.uint8))
    + b"\xff\xd9",
    "truncated CMYK": encoded(Image.new("CMYK", (300, 300), (9, 90, 200, 30)), "JPEG")[:-400],
    "header alone": photograph()[:20],
    "start marker alone": b"\xff\xd8\xff",
    "empty": b"",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "truncated PNG": encoded(Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)), "PNG")[:-900],
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_fault_12_broken_file_is_an_error_that_names_it(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data)
    with pytest.raises(UserError, match=r"image.jpg: cannot be decoded .*Replace the file"):
        decode_image(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.jpg.*missing"):
        decode_image(tmp_path / "absent.jpg")


def test_jpeg_is_what_the_decoder_gives(tmp_path: Path) -> None:
    data = photograph(quality=92)
    image = decode_image(write(tmp_path, data))
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), simplejpeg.decode_jpeg(data))


def sampled(luma: tuple[int, int], *chroma: tuple[int, int]) -> bytes:
    """A gray JPEG with colour components of the (horizontal, vertical) samplings given, each in a scan of its own."""
    factors = (luma, *chroma)
    most = [max(each) for each in zip(*factors, strict=True)]
    gray = Image.fromarray(SMOOTH).convert("L").resize((64, 64))
    head, frame, scans = b"", b"", b""
    for number, (across, down) in enumerate(factors):
        plane = gray if number == 0 else Image.new("L", (64, 64), 128)
        plane = plane.resize((64 * across // most[0], 64 * down // most[1]))
        before, scan = encoded(plane, "JPEG", quality=95).split(b"\xff\xda")
        head = head or before
        frame += bytes((number + 1, across << 4 | down, 0))
        scans += b"\xff\xda\x00\x08\x01" + bytes((number + 1,)) + b"\x00\x00\x3f\x00" + scan[8:-2]
    start = head.index(b"\xff\xc0")
    frame = b"\xff\xc0\x00\x11\x08\x00\x40\x00\x40\x03" + frame
    return head[:start] + frame + head[start + 13 :] + scans + b"\xff\xd9"


RARE = {
    "4:4:1": sampled((1, 4), (1, 1), (1, 1)),
    "a third": sampled((3, 1), (1, 1), (1, 1)),
    "coarse luma": sampled((1, 1), (2, 2), (2, 2)),
    "unequal colours": sampled((2, 2), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("data", RARE.values(), ids=RARE.keys())
def test_jpegs_of_rare_samplings_are_read(tmp_path: Path, data: bytes) -> None:
    with pytest.raises((KeyError, ValueError)):
        simplejpeg.decode_jpeg_header(data)
    image = decode_image(write(tmp_path, data)).float()
    gray = np.asarray(Image.fromarray(SMOOTH).convert("L").resize((64, 64)), np.float32)
    assert (image - torch.from_numpy(gray)).abs().mean() < 8
    with pytest.raises(UserError, match=r"image\.jpg"):
        decode_image(write(tmp_path, data[:-300]))


@pytest.mark.parametrize("raised", [KeyError(6), RuntimeError("?"), ZeroDivisionError(), IndexError()])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_whatever_a_decoder_raises_is_the_images_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, raised: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    path = write(tmp_path, encoded(Image.fromarray(SMOOTH), format))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(UserError, match=rf"image\.jpg: cannot be decoded .*{type(raised).__name__}|image\.jpg.*\?"):
        decode_image(path)


def test_what_is_not_the_images_fault_passes() -> None:
    with pytest.raises(KeyboardInterrupt), faults_named("image"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"image: cannot be decoded \(MemoryError"), faults_named("image"):
        raise MemoryError


def test_pillow_warns_of_nothing_that_is_handled_here(tmp_path: Path) -> None:
    """In a process of its own, since pytest has its own filters: palettes with alpha, broken EXIF, huge sizes."""
    palette = Image.fromarray(SMOOTH).convert("P", palette=Image.Palette.ADAPTIVE)
    write(tmp_path, encoded(palette, "PNG", transparency=bytes(range(256))), "0.png")
    write(tmp_path, encoded(Image.new("1", (10000, 9500)), "PNG"), "1.png")
    tiff = encoded(Image.fromarray(SMOOTH), "TIFF", description="x" * 9)
    write(tmp_path, tiff[:-4] + b"\xff\xff\xff\xff", "2.tif")
    code = """
import sys, threading
from pathlib import Path
from detr_fast.data.decode import decode_image
from detr_fast.data.headers import read_header
from detr_fast.data.photographs import why_passed_over
from detr_fast.weights.container import read_container
from detr_fast.weights.files import read_weights_file
paths = sorted(Path(sys.argv[1]).iterdir())
threads = [threading.Thread(target=lambda path=path: (read_header(path), decode_image(path))) for path in 2 * paths]
[thread.start() for thread in threads], [thread.join() for thread in threads]
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("error")
def test_alpha_of_a_palette_is_dropped_and_the_image_that_was_given_is_left_alone() -> None:
    palette = Image.fromarray(SMOOTH).convert("P", palette=Image.Palette.ADAPTIVE)
    opaque = np.asarray(palette.convert("RGB"))
    palette.info["transparency"] = bytes(range(256))
    assert np.array_equal(rgb_pixels(palette), opaque)
    assert palette.info["transparency"] == bytes(range(256))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "HEIC.*convert it to JPEG or PNG"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2" + bytes(200), "video"),
        (b"%PDF-1.7\n", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (encoded(Image.fromarray(SMOOTH), "TIFF", tiffinfo={254: 1}), "reduced copy"),
    ],
)
def test_other_formats_are_named_with_what_to_do(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(UserError, match=rf"photo\.jpg: .*{said}"):
        decode_image(write(tmp_path, data, "photo.jpg"))


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "WEBP", "AVIF"])
def test_fault_13_content_decides_not_the_ending(tmp_path: Path, format: str) -> None:
    image = decode_image(write(tmp_path, encoded(Image.new("RGB", (60, 40), (200, 30, 90)), format), "photo.jpg"))
    assert image.shape == (3, 40, 60)
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 30.0, 90.0])).abs().max() < 3


def test_fault_13_jpeg_named_png(tmp_path: Path) -> None:
    assert decode_image(write(tmp_path, photograph(), "photo.png")).shape == (3, 40, 60)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_fault_14_png_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(SMOOTH).convert(mode)
    decoded = decode_image(write(tmp_path, encoded(image, "PNG"))).permute(1, 2, 0).numpy()
    assert np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_fault_14_alpha_is_dropped_without_blending(tmp_path: Path) -> None:
    decoded = decode_image(write(tmp_path, encoded(Image.new("RGBA", (8, 8), (10, 200, 30, 0)), "PNG")))
    assert decoded[:, 0, 0].tolist() == [10, 200, 30]


def test_fault_14_gray_and_cmyk_jpeg(tmp_path: Path) -> None:
    gray = decode_image(write(tmp_path, encoded(Image.fromarray(SMOOTH).convert("L"), "JPEG", quality=95)))
    assert gray.shape == (3, 40, 60) and torch.equal(gray[0], gray[2])
    cmyk = decode_image(write(tmp_path, encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(cmyk.permute(1, 2, 0).numpy().astype(int) - SMOOTH).mean() < 6


def test_fault_14_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode_image(write(tmp_path, encoded(Image.fromarray(values), "PNG")))
    assert np.array_equal(decoded[1].numpy(), (values >> 8).astype(np.uint8))


def test_fault_14_floating_point_pixels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"))
    with pytest.raises(UserError, match=r"floating-point numbers, .* scale them to 8 bits"):
        decode_image(path)
    assert read_header(path) is None  # so that training asks why before its first step


def test_fault_15_exif_rotation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by a quarter
    for format in ("JPEG", "PNG"):
        path = write(tmp_path, encoded(Image.fromarray(SMOOTH), format, exif=exif))
        assert decode_image(path).shape == (3, 40, 60)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_fault_17_too_many_pixels_are_refused_by_either_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    path = write(tmp_path, encoded(Image.new("RGB", (60, 40)), format))
    monkeypatch.setattr(decode, "MOST_PIXELS", 60 * 40)
    decode_image(path)
    monkeypatch.setattr(decode, "MOST_PIXELS", 60 * 40 - 1)
    with pytest.raises(UserError, match="60 x 40 pixels"):
        decode_image(path)


def test_fault_17_a_real_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bomb\.png"):
        decode_image(write(tmp_path, encoded(Image.new("1", (15000, 12000)), "PNG"), "bomb.png"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    format=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"]),
    seed=st.integers(0, 2**32 - 1),
    flips=st.integers(1, 8),
)
def test_fault_12_damaged_bytes_give_an_image_or_a_clear_error(
    tmp_path: Path, format: str, seed: int, flips: int
) -> None:
    data = bytearray(encoded(Image.fromarray(SMOOTH), format))
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(data), flips):
        data[place] = rng.integers(256)
    try:
        image = decode_image(write(tmp_path, bytes(data)))
    except UserError as error:
        assert "image.jpg" in str(error)
    else:
        assert image.dtype == torch.uint8 and image.shape[0] == 3


@pytest.mark.parametrize("format", READ_FORMATS)
def test_a_header_tells_the_size_that_decoding_finds(format: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned for display, which is ignored
    options = {"exif": exif.tobytes()} if format == "JPEG" else {}
    path = write(tmp_path, encoded(Image.fromarray(SMOOTH), format, **options))
    header = read_header(path)
    assert header is not None and header.size == tuple(decode_image(path).shape[1:]) == (40, 60)


def test_a_header_that_is_none_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"<html></html>", photograph()[:20]):
        assert read_header(write(tmp_path, data)) is None
    assert read_header(tmp_path / "missing.jpg") is None and read_header(tmp_path) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_header(write(tmp_path, photograph())) is None


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    """Reading a pipe waits for someone to write; a device may have no end."""
    path = tmp_path / "any.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert why_passed_over(path) == "no regular file" and read_header(path) is None
    for read in (decode_image, read_weights_file, read_container):
        with pytest.raises(UserError, match=r"any\.png.* \(?(is |it is )?no regular file"):
            read(path)
    path.unlink()
    path.symlink_to(tmp_path / "gone.png")
    assert why_passed_over(path) is None  # and reading it says that it is missing
    with pytest.raises(UserError, match=r"any\.png is a broken link"):
        read_weights_file(path)


@pytest.mark.parametrize("kept", [40, 0.5])
def test_a_cut_avif_is_not_said_to_be_unread(kept: float, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(SMOOTH), "AVIF")
    path = write(tmp_path, data[: int(kept if kept > 1 else len(data) * kept)])
    with pytest.raises(UserError, match=r"image\.jpg: cannot be decoded \(a broken AVIF, or cut off") as raised:
        decode_image(path)
    assert "not read" not in str(raised.value) and "convert" not in str(raised.value)
