"""Formats of boxes other than COCO's x, y, width, height in pixels: another unit, another order, or both."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

ROUNDING_PX = 0.05
"""How far a box may pass its image's edge by the rounding of its coordinates alone."""
RELATIVE_LEAST_SIDE_PX = 8
"""Smallest image whose boxes of less than a pixel cannot be meant."""
PERCENT_LEAST_SIDE_PX, PERCENT_LEAST_BOXES = 300, 50
"""That no box lies beyond 100 says little of smaller images, or of few boxes."""


Fits = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Order(NamedTuple):
    """A way to write a box as four numbers, and what it takes to be told from COCO's."""

    words: str
    fits: Fits
    """Tells of boxes (N, 4) and sizes (N, 2) which ones (N,) are right if they are written so."""
    least_fitting: float
    """Fraction of boxes that are right so"""
    least_wrong: float
    """and fraction that pass their image's edge if they are COCO's"""
    least_boxes: int = 20
    least_wrong_boxes: int = 5
    most_misfits: float = 0.1
    """How many may be wrong so, for one that is wrong as COCO's: careless boxes are wrong either way"""


def fit_as_corners(boxes: np.ndarray, sizes_wh: np.ndarray) -> np.ndarray:
    low, high = np.split(boxes, 2, axis=1)
    return np.asarray(((high > low) & (high <= sizes_wh + ROUNDING_PX)).all(axis=1))


def fit_as_centres(boxes: np.ndarray, sizes_wh: np.ndarray) -> np.ndarray:
    centre, extent = np.split(boxes, 2, axis=1)
    inside = (centre - extent / 2 >= -1) & (centre + extent / 2 <= sizes_wh + 1)
    return np.asarray((inside & (extent > 0)).all(axis=1))


def fit_as_coco(boxes: np.ndarray, sizes_wh: np.ndarray) -> np.ndarray:
    low, extent = np.split(boxes, 2, axis=1)
    return np.asarray((low + extent <= sizes_wh + 1).all(axis=1))


def with_y_first(fits: Fits) -> Fits:
    """Return `fits` of boxes that have y before x; an image that is square tells neither from the other."""
    return lambda boxes, sizes_wh: fits(boxes[:, [1, 0, 3, 2]], sizes_wh)


ORDERS = (
    Order("x0, y0, x1, y1", fit_as_corners, 0.95, 0.2, least_boxes=1, least_wrong_boxes=1, most_misfits=1),
    Order("centre x, centre y, width, height", fit_as_centres, 0.99, 0),
    Order("y, x, height, width", with_y_first(fit_as_coco), 0.99, 0.1),
    Order("y0, x0, y1, x1", with_y_first(fit_as_corners), 0.99, 0.2),
)


def likely_order(boxes_px: np.ndarray, sizes_wh: np.ndarray) -> str:
    """Name the order in which almost all boxes (N, 4) would be right, where many are wrong in COCO's; "" if none."""
    if not len(boxes_px):
        return ""
    wrong = np.count_nonzero(~fit_as_coco(boxes_px, sizes_wh))
    for order in ORDERS:
        enough = len(boxes_px) >= order.least_boxes and wrong >= order.least_wrong_boxes
        if enough and wrong > order.least_wrong * len(boxes_px):
            fitting = order.fits(boxes_px, sizes_wh)
            misfits = np.count_nonzero(~fitting)
            if fitting.mean() > order.least_fitting and misfits <= order.most_misfits * wrong:
                return order.words
    return ""


def look_relative(boxes: np.ndarray, sizes_wh: np.ndarray) -> np.ndarray:
    """Tell which boxes (N,) look relative to the image.

    Where nearly all boxes lie within the image's first pixel, these; else those that are less than a pixel, and not cut
    off by the image's corner.
    """
    inside = ((boxes >= 0) & (boxes <= 1.001)).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    inside &= (sizes_wh >= RELATIVE_LEAST_SIDE_PX).all(axis=1)
    if inside.mean() <= 0.9:
        inside &= (boxes[:, :2] > 0).any(axis=1) & (boxes[:, 2:] < 1).all(axis=1)
    return np.asarray(inside)


def look_like_percent(boxes: np.ndarray, sizes_wh: np.ndarray) -> bool:
    """Tell whether many boxes, spread from 0 to 100 both ways, leave all the rest of far larger images empty."""
    if len(boxes) < PERCENT_LEAST_BOXES or sizes_wh.min() < PERCENT_LEAST_SIDE_PX:
        return False
    low, extent = np.split(boxes, 2, axis=1)
    within = boxes.min() >= 0 and boxes.max() <= 100.5
    return bool(within and ((low + extent).max(axis=0) > 90).all() and (low.std(axis=0) > 10).all())


def likely_formats(boxes: np.ndarray, sizes_wh: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what boxes (N, 4) look like instead of COCO's, in words, and which ones (N,).

    `sizes_wh` (N, 2): their images', in pixels. Nothing is yielded where COCO's format is likely, or nothing is sure.
    """
    if not len(boxes):
        return
    scale = np.tile(sizes_wh, 2)
    relative = look_relative(boxes, sizes_wh)
    if relative.any():
        order = likely_order((boxes * scale)[relative], sizes_wh[relative])
        yield f"relative {order} (0 to 1)" if order else "relative ones (0 to 1, as YOLO has them)", relative
    elif look_like_percent(boxes, sizes_wh):
        order = likely_order(boxes * scale / 100, sizes_wh)
        yield f"{order or 'x, y, width, height'} in percent of the image", ~relative
        return
    order = likely_order(boxes[~relative], sizes_wh[~relative])
    if order:
        yield order, ~relative
