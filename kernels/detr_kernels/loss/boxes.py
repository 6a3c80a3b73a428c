"""Generalized IoU of boxes inside kernels, with the gradient that torch's autograd gives, ties included.

    IoU  = I / U,    U = area(a) + area(b) - I
    GIoU = IoU - (H - U) / H

I is the area of the intersection, H that of the smallest box that holds both. (Rezatofighi et al. 2019, algorithm 1.)
No eps, as in DETR: two empty boxes on one point give NaN. A box in a kernel is a tuple cx, cy, w, h of float32 tensors.
"""

import torch
from torch import Tensor

from detr_kernels.triton_compat import tl, triton


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32, in which the plain references compute; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def iou_and_giou_ref(a_cxcywh: Tensor, b_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """Compute IoU and GIoU (...) of boxes (..., 4) and (..., 4), broadcast, in plain torch."""
    (a_center, a_size), (b_center, b_size) = a_cxcywh.split(2, -1), b_cxcywh.split(2, -1)
    a_low, a_high = a_center - 0.5 * a_size, a_center + 0.5 * a_size
    b_low, b_high = b_center - 0.5 * b_size, b_center + 0.5 * b_size
    intersection = area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    hull = area((torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).clamp(min=0))
    union = area(a_high - a_low) + area(b_high - b_low) - intersection
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def generalized_iou_ref(a_cxcywh: Tensor, b_cxcywh: Tensor) -> Tensor:
    """Compute GIoU (...) of boxes (..., 4) and (..., 4), broadcast, in plain torch."""
    return iou_and_giou_ref(a_cxcywh, b_cxcywh)[1]


def area(size: Tensor) -> Tensor:
    """Multiply sides (..., 2) -> (...), without `prod`, whose backward reads on the host whether an entry is zero."""
    return size[..., 0] * size[..., 1]


@triton.jit
def load_box(boxes, index, inside):
    """Load box number `index` of `boxes` (..., 4); outside, the middle quarter, which has an area to divide by."""
    x = tl.load(boxes + index * 4, mask=inside, other=0.5).to(tl.float32)
    y = tl.load(boxes + index * 4 + 1, mask=inside, other=0.5).to(tl.float32)
    width = tl.load(boxes + index * 4 + 2, mask=inside, other=0.5).to(tl.float32)
    height = tl.load(boxes + index * 4 + 3, mask=inside, other=0.5).to(tl.float32)
    return x, y, width, height


@triton.jit
def l1_distance(a, b):
    """Sum |a - b| over the four numbers of two boxes, broadcast."""
    return tl.abs(a[0] - b[0]) + tl.abs(a[1] - b[1]) + tl.abs(a[2] - b[2]) + tl.abs(a[3] - b[3])


@triton.jit
def _side_lengths(a_center, a_size, b_center, b_size):
    """Compute the lengths of a, b, their intersection and their hull along one axis."""
    # sizes are taken between the rounded corners, as torch does: which boxes are empty depends on it
    a_low, a_high = a_center - 0.5 * a_size, a_center + 0.5 * a_size
    b_low, b_high = b_center - 0.5 * b_size, b_center + 0.5 * b_size
    intersection = tl.maximum(tl.minimum(a_high, b_high) - tl.maximum(a_low, b_low), 0.0)
    hull = tl.maximum(tl.maximum(a_high, b_high) - tl.minimum(a_low, b_low), 0.0)
    return a_high - a_low, b_high - b_low, intersection, hull


@triton.jit
def iou_and_giou(a, b):
    """Compute IoU and GIoU of two boxes, broadcast."""
    a_width, b_width, width, hull_width = _side_lengths(a[0], a[2], b[0], b[2])
    a_height, b_height, height, hull_height = _side_lengths(a[1], a[3], b[1], b[3])
    intersection, hull = width * height, hull_width * hull_height
    union = a_width * a_height + b_width * b_height - intersection
    iou = intersection / union
    return iou, iou - (hull - union) / hull


@triton.jit
def generalized_iou(a, b):
    """Compute GIoU of two boxes, broadcast."""
    return iou_and_giou(a, b)[1]


@triton.jit
def _larger_fraction(a, b):
    """Return the fraction of max(a, b)'s gradient that is a's, and of min(b, a)'s that is b's: half at a tie."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _axis_gradient(a_center, a_size, b_center, b_size, d_length, d_intersection, d_hull):
    """Compute the gradients of a's center and size along one axis, from those of the three lengths."""
    a_low, a_high = a_center - 0.5 * a_size, a_center + 0.5 * a_size
    b_low, b_high = b_center - 0.5 * b_size, b_center + 0.5 * b_size
    # clamp(min=0) lets the gradient through at 0 itself
    touching = tl.minimum(a_high, b_high) >= tl.maximum(a_low, b_low)
    d_intersection = tl.where(touching, d_intersection, 0.0)
    d_hull = tl.where(tl.maximum(a_high, b_high) >= tl.minimum(a_low, b_low), d_hull, 0.0)
    d_high = d_length + d_intersection * _larger_fraction(b_high, a_high) + d_hull * _larger_fraction(a_high, b_high)
    minus_d_low = d_length + d_intersection * _larger_fraction(a_low, b_low) + d_hull * _larger_fraction(b_low, a_low)
    return d_high - minus_d_low, 0.5 * (d_high + minus_d_low)


@triton.jit
def generalized_iou_gradient(a, b):
    """Compute the gradient of GIoU for a, as a box: d_cx, d_cy, d_w, d_h."""
    a_width, b_width, width, hull_width = _side_lengths(a[0], a[2], b[0], b[2])
    a_height, b_height, height, hull_height = _side_lengths(a[1], a[3], b[1], b[3])
    intersection, hull = width * height, hull_width * hull_height
    union = a_width * a_height + b_width * b_height - intersection
    d_union = 1 / hull - intersection / union / union
    d_intersection = 1 / union - d_union
    d_hull = -union / hull / hull
    d_x, d_width = _axis_gradient(
        a[0], a[2], b[0], b[2], d_union * a_height, d_intersection * height, d_hull * hull_height
    )
    d_y, d_height = _axis_gradient(
        a[1], a[3], b[1], b[3], d_union * a_width, d_intersection * width, d_hull * hull_width
    )
    return d_x, d_y, d_width, d_height
