"""Image files to RGB pixels, one rule for every kind of file.

The content decides how a file is read, never its ending. Gray and palette images become RGB, alpha is dropped without
blending, CMYK goes through Pillow's conversion, 16-bit gray keeps its upper 8 bits, an animation gives its first frame.
EXIF rotation is ignored, as COCO's own tools do: boxes refer to the pixels as they are stored.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from detr_fast.config import UserError

MOST_PIXELS = 178_956_970
"""Twice Pillow's limit for a warning, which is where Pillow itself refuses; simplejpeg has no limit of its own."""
JPEG_START = b"\xff\xd8\xff"
PILLOW_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
BROKEN_FILE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow raises for broken files."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a file holds."""

    image: Tensor
    """uint8 (3, h, w), in channels-last memory, which torchvision resizes fastest"""
    size: tuple[int, int]
    """(h, w) of the file"""
    shrunk: int = 1
    """How many times smaller `image` is, each way; sides are rounded up."""


def decode_image(path: Path) -> Tensor:
    """The whole image as uint8 (3, h, w). Raises UserError as `decode_file`."""
    return decode_file(path).image


def decode_file(path: Path, shrunk: int = 1) -> Decoded:
    """The image, or, of a JPEG, one 1, 2, 4 or 8 times smaller, which costs less than the whole.

    Raises UserError, naming the file, where it is missing, no image, truncated, corrupt or over `MOST_PIXELS`.
    """
    try:
        return decode_bytes(path.read_bytes(), shrunk)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the image file is missing.") from error
    except BROKEN_FILE_ERRORS as error:
        raise UserError(
            f"{path}: cannot be decoded ({error}). Replace the file, or go on without it: --on-bad-image skip."
        ) from error


def header_size(path: Path) -> tuple[int, int] | None:
    """Return (h, w) in pixels as the file's header says, or None where none can be read. Pixels are not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=PILLOW_FORMATS) as image:
                return image.height, image.width
        except (*BROKEN_FILE_ERRORS, Image.DecompressionBombError):
            return None


def decode_bytes(data: bytes, shrunk: int = 1) -> Decoded:
    """As `decode_file`, of a file's content. Raises one of `BROKEN_FILE_ERRORS`."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(JPEG_START):
        return decode_jpeg(data, shrunk)
    return decode_with_pillow(data)


def decode_jpeg(data: bytes, shrunk: int) -> Decoded:
    """Whatever makes the decoder warn is an error: a scan of garbage and a few stray bytes give the same warning."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    refuse_bomb(height, width)
    if colorspace in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK", strict=True)  # Pillow accepts a corrupt scan
        return decode_with_pillow(data)
    least = {"min_height": -(-height // shrunk), "min_width": -(-width // shrunk)}
    pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **least)
    return Decoded(torch.from_numpy(pixels).permute(2, 0, 1), (height, width), shrunk)


def decode_with_pillow(data: bytes) -> Decoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS)
        except Image.UnidentifiedImageError as error:
            raise ValueError(f"not a {', '.join(PILLOW_FORMATS)} image") from error
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        refuse_bomb(image.height, image.width)
        return Decoded(torch.from_numpy(rgb_pixels(image)).permute(2, 0, 1), (image.height, image.width))


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """(h, w, 3) uint8."""
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
        upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(upper[..., None], 3, axis=2)
    return np.array(image.convert("RGB"))


def refuse_bomb(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MOST_PIXELS} that are read")
