"""Duplicate annotations and images, as where the exports of two annotators are joined."""

import os
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detr_fast.data.annotations import Annotations
from detr_fast.data.box_formats import ROUNDING_PX
from detr_fast.data.corrections import shortened

NEARLY_EQUAL_IOU = 0.95
MOST_NEIGHBOURS = 200
"""Boxes that a box is compared with at most."""
NAMED = 5


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Ids of annotations whose box an earlier annotation of the same image has, as `Annotations` numbers them."""

    equal: np.ndarray
    """Those of the same class, with the same box up to rounding"""
    nearly_equal: np.ndarray
    """Those of the same class, with an IoU above NEARLY_EQUAL_IOU"""
    two_classes: np.ndarray
    """Those of another class, with the same box"""
    renumbered: bool
    """The ids are positions in the file, counted from 1"""

    def problems(self) -> Iterator[str]:
        if len(self.equal):
            yield (
                f"{len(self.equal)} annotations repeat an earlier one, its image, class and box "
                f"({self.named(self.equal)}): keep one of each"
            )

    def notes(self) -> Iterator[str]:
        """Yield a line for each kind of duplicate that may be meant."""
        if len(self.nearly_equal):
            yield (
                f"{len(self.nearly_equal)} annotations are nearly an earlier one of their class "
                f"(IoU above {NEARLY_EQUAL_IOU}; {self.named(self.nearly_equal)}): "
                "where they mean one object, keep one of each"
            )
        if len(self.two_classes):
            yield (
                f"{len(self.two_classes)} annotations have the box of an earlier one, but another class "
                f"({self.named(self.two_classes)}): where they mean one object, keep one"
            )

    def named(self, ids: np.ndarray) -> str:
        """Name the first ids; their positions in the file, counted from 0, where its ids are no use."""
        names = [f"number {id_ - 1}" for id_ in ids.tolist()] if self.renumbered else ids.tolist()
        return f"annotations {shortened(names, NAMED)}"


def find_duplicates(annotations: Annotations) -> Duplicates:
    """Find annotations whose box, nearly equal, an earlier one of the same image has: 0.3 s for COCO's 860,000.

    A box is compared only with those whose edges have nearly its sum, as all that nearly equal it do, and few others.
    """
    boxes = annotations.boxes_xywh_px
    images = np.searchsorted([image.id for image in annotations.images], annotations.image_ids)
    edges = (boxes * [2, 2, 1, 1]).sum(axis=1)  # x0 + x1 + y0 + y1, of equal boxes the same to the last bit
    other_sum = (boxes * [1, 2, 4, 7]).sum(axis=1)  # brings equal boxes together among those of one sum of edges
    order = np.lexsort((other_sum, edges, images))
    images, edges, boxes = images[order], edges[order], boxes[order]
    # an edge differs by (1 - IoU) of the larger box's side at most, which is 1 / IoU of the smaller one's
    reach = edges + 2 * (1 / NEARLY_EQUAL_IOU - 1) * boxes[:, 2:].sum(axis=1) + ROUNDING_PX
    first = np.arange(len(order))
    pairs = [np.zeros((0, 2), np.int64)]
    for distance in range(1, MOST_NEIGHBOURS + 1):
        first = first[: np.searchsorted(first, len(order) - distance)]
        second = first + distance
        first = first[(edges[second] <= reach[first]) & (images[second] == images[first])]  # others reach none
        if not len(first):
            break
        near = first[iou(boxes[first], boxes[first + distance]) > NEARLY_EQUAL_IOU]
        pairs.append(order[np.column_stack((near, near + distance))])
    return classify(annotations, np.sort(np.concatenate(pairs), axis=1))  # the earlier in the file first


def classify(annotations: Annotations, pairs: np.ndarray) -> Duplicates:
    """Sort `pairs` (P, 2) of annotations with nearly equal boxes by kind; each is named by its later one."""
    one, other = annotations.boxes_xywh_px[pairs.T]
    smallest = np.minimum(one, other)[:, 2:].min(axis=1)
    rounding = np.where(smallest >= 1, ROUNDING_PX, 1e-9)  # boxes of less than a pixel may be relative
    equal = (np.abs(one - other) <= rounding[:, None]).all(axis=1)
    one_class, both_crowds = (
        column[pairs[:, 0]] == column[pairs[:, 1]] for column in (annotations.category_ids, annotations.crowd)
    )
    later = annotations.ids[pairs[:, 1]]
    duplicates = np.unique(later[equal & one_class & both_crowds])
    return Duplicates(
        equal=duplicates,
        nearly_equal=np.setdiff1d(later[~equal & one_class & both_crowds], duplicates),
        two_classes=np.setdiff1d(later[equal & ~one_class & both_crowds], duplicates),
        renumbered=annotations.corrections.renumbered,
    )


def iou(one_xywh: np.ndarray, other_xywh: np.ndarray) -> np.ndarray:
    """Compute IoU (N,) of boxes (N, 4) with positive width and height."""
    low = np.maximum(one_xywh[:, :2], other_xywh[:, :2])
    high = np.minimum(one_xywh[:, :2] + one_xywh[:, 2:], other_xywh[:, :2] + other_xywh[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=1)
    return shared / (one_xywh[:, 2:].prod(axis=1) + other_xywh[:, 2:].prod(axis=1) - shared)


def identity(path: Path) -> Hashable:
    """Return a file's device and inode, which its names and links share; the path where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return path
    return found.st_dev, found.st_ino


def files_listed_twice(ids: Sequence[int], files: Sequence[Path]) -> Iterator[str]:
    """Yield a line where a file, by whatever name, has several image `ids`: each then misses the others' objects."""
    keys = [identity(path) for path in files]
    if len(set(keys)) == len(keys):
        return
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        positions[key].append(position)
    doubled = [
        f"{files[found[0]]}: ids {', '.join(str(ids[position]) for position in found)}"
        for found in positions.values()
        if len(found) > 1
    ]
    if doubled:
        yield (
            f"{len(doubled)} image files are listed more than once ({shortened(doubled, NAMED)}): "
            "list each once, with all of its annotations"
        )
