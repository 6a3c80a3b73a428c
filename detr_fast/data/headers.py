"""Headers of image files: size, and how EXIF would have the image turned. Pixels are not read."""

from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from detr_fast.config import UserError
from detr_fast.data.decode import faults_named, refuse_floats
from detr_fast.data.formats import READ_FORMATS
from detr_fast.paths import kind_of

UPRIGHT = 1
"""EXIF's orientation of an image that is stored as it is to be seen; 2 to 8 mirror it, turn it, or both."""


@dataclass(frozen=True)
class Header:
    """The facts that a file states before its pixels."""

    size: tuple[int, int]
    """(h, w) in pixels, as the image is read"""
    orientation: int
    """1 to 8, EXIF's"""
    applied: bool
    """True where reading the image turns it by its orientation: for a TIFF, whose own tag it is, alone."""
    deep: bool = False
    """True for gray images with more than 8 bits, of which the upper 8 of 16 are read."""

    @property
    def turned(self) -> bool:
        """Tell whether other programs show the image in another way than it is read here."""
        return self.orientation != UPRIGHT and not self.applied


def read_header(path: Path) -> Header | None:
    """Read a file's header; None where it or the pixels cannot be read. Raises nothing, whatever a file holds."""
    try:
        if kind_of(path) != "file":
            return None
        with faults_named(str(path)), Image.open(path, formats=READ_FORMATS) as image:
            refuse_floats(image)
            size, tiff, deep = (image.height, image.width), image.format == "TIFF", image.mode.startswith("I")
            return Header(size, orientation_of(image), applied=tiff, deep=deep)
    except UserError:
        return None


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation of an open image, from EXIF or XMP; `UPRIGHT` where there is none that can be read."""
    try:
        with faults_named("EXIF"):
            exif = Image.Image.getexif(image)  # a PNG's own method would read its pixels
            value = exif.get(ExifTags.Base.Orientation)
    except UserError:
        return UPRIGHT
    return value if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT
