"""Image files to RGB pixels, one rule for every kind of file.

The content decides how a file is read, never its ending. Gray and palette images become RGB, alpha is dropped without
blending, CMYK goes through Pillow's conversion, 16-bit gray keeps its upper 8 bits, floating-point pixels are refused,
an animation gives its first frame. EXIF rotation is ignored, as COCO's own tools do: boxes refer to the pixels as they
are stored. A TIFF's own orientation is applied. Decoders are others' code: whatever they raise is the image's fault,
one UserError that names it.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from detr_fast.config import UserError
from detr_fast.data.formats import READ_FORMATS, START_BYTES, described

MOST_PIXELS = 178_956_970
"""Twice Pillow's limit for a warning, which is where Pillow itself refuses; simplejpeg has no limit of its own."""
JPEG_START = b"\xff\xd8\xff"
REDUCED_COPY = 254, 1
"""Number and value of the TIFF tag of a reduced copy, with which cameras' raw files begin."""
for kind in (UserWarning, RuntimeWarning):
    # of tags, EXIF and profiles, which are not read; large images are refused below
    warnings.filterwarnings("ignore", category=kind, module=r"PIL\.")


@dataclass(frozen=True, eq=False)
class Decoded:
    """A decoded image file."""

    image: Tensor
    """uint8 (3, h, w), in channels-last memory, which torchvision resizes fastest"""
    size: tuple[int, int]
    """(h, w) of the file"""
    draft_scale: int = 1
    """How many times smaller `image` is than the file's, each way: a JPEG's draft scale. Sides are rounded up."""


def decode_image(path: Path) -> Tensor:
    """Return the whole image as uint8 (3, h, w). Raises UserError as `decode_file`."""
    return decode_file(path).image


def decode_file(path: Path, draft_scale: int = 1) -> Decoded:
    """Decode the image, or, of a JPEG, one 1, 2, 4 or 8 times smaller, which costs less than the whole.

    Raises UserError, naming the file, where it is missing, no image, truncated, corrupt or over `MOST_PIXELS`.
    """
    with faults_named(str(path)):
        if not S_ISREG(path.stat().st_mode):  # a pipe or a device may be read for ever
            raise ValueError("no regular file")
        return decode_bytes(path.read_bytes(), draft_scale)


@contextmanager
def faults_named(image: str) -> Iterator[None]:
    """Turn whatever reading and decoding raises into a UserError that begins with `image`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{image}: the image file is missing.") from error
    except Exception as error:  # no list of what decoders raise for a broken or rare file has ever been complete
        told = isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError) and str(error)
        raise UserError(
            f"{image}: cannot be decoded ({told or repr(error)}). Replace the file, or take it away."
        ) from error


def decode_bytes(data: bytes, draft_scale: int = 1) -> Decoded:
    """Decode a file's content as `decode_file` does. Raises what the decoders do."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(JPEG_START):
        return decode_jpeg(data, draft_scale)
    return decode_with_pillow(data)


def decode_jpeg(data: bytes, draft_scale: int) -> Decoded:
    """Decode strictly: a warning is an error, since a garbled scan and a few stray bytes give the same one.

    Pillow reads the JPEGs that this decoder does not know, such as those of rare colour subsampling.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except (KeyError, ValueError) as error:
        return decode_rare_jpeg(data, error)
    refuse_bomb(height, width)
    cmyk = colorspace in ("CMYK", "YCCK")
    least = {} if cmyk else {"min_height": -(-height // draft_scale), "min_width": -(-width // draft_scale)}
    try:
        pixels = simplejpeg.decode_jpeg(data, "CMYK" if cmyk else "RGB", strict=True, **least)
    except ValueError as error:
        if "Unsupported" not in str(error):
            raise
        return decode_rare_jpeg(data, error)
    if cmyk:  # decoded for its errors alone: Pillow accepts a corrupt scan
        return decode_with_pillow(data)
    return Decoded(torch.from_numpy(pixels).permute(2, 0, 1), (height, width), draft_scale)


def decode_rare_jpeg(data: bytes, problem: Exception) -> Decoded:
    """Decode by Pillow what the usual decoder has a `problem` with; raises ValueError with both where it cannot."""
    try:
        return decode_with_pillow(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{problem}; {error}") from error


def decode_with_pillow(data: bytes) -> Decoded:
    try:
        image = Image.open(io.BytesIO(data), formats=READ_FORMATS)
    except Image.UnidentifiedImageError as error:
        jpeg = "a JPEG of a rare form, or broken" if data.startswith(JPEG_START) else None
        unknown = f"not a {', '.join(READ_FORMATS)} image"
        raise ValueError(jpeg or described(data[:START_BYTES]) or unknown) from error
    refuse_bomb(image.height, image.width)
    if getattr(image, "tag_v2", {}).get(REDUCED_COPY[0]) == REDUCED_COPY[1]:
        raise ValueError(
            "a camera's raw file, or another TIFF that begins with a reduced copy: convert it to JPEG or PNG"
        )
    return Decoded(torch.from_numpy(rgb_pixels(image)).permute(2, 0, 1), (image.height, image.width))


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return (h, w, 3) uint8. Raises ValueError for pixels that are no whole numbers."""
    refuse_floats(image)
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
        upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(upper[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:  # else Pillow warns, and gives the same
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def refuse_floats(image: Image.Image) -> None:
    """Raise ValueError for floating-point pixels, whose range is not known: 1 may be white, or nearly black."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of a range that is not known: scale them to 8 bits")


def refuse_bomb(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MOST_PIXELS} that are read")
