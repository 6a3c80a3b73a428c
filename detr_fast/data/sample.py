"""What reading one image gives."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One image as it goes into a batch, before it is resized."""

    image: Tensor
    """uint8 (3, h, w)"""
    labels: Tensor
    """(T,) int64"""
    boxes_cxcywh: Tensor
    """(T, 4) float32, relative to the image, mirrored where that is to be"""
    image_id: int
    original_size: tuple[int, int]
    """(h, w) of the file, before any transform"""
    size: tuple[int, int]
    """(h, w) that the image is to have in the batch"""
    mirrored: bool = False
    """Whether the image is still to be mirrored, left to right"""
