"""Sizes of the objects that training meets, of the annotations and the augmentation alone."""

from typing import NamedTuple

import numpy as np

from detr_fast.data.coco import CocoDataset

SAMPLED = 5_000
"""Images, those of several epochs where there are fewer, whose sizes are looked at."""


class DrawnObjects(NamedTuple):
    """Objects in the sizes that training draws; of one that a crop cuts, the whole."""

    sizes_px: np.ndarray
    """(M, 2), width and height"""
    images_px: np.ndarray
    """(M, 2), of the crops that the objects are on"""


def drawn_objects(train_set: CocoDataset) -> DrawnObjects:
    """Draw the objects of some thousand samples; none where no image has one."""
    counts = np.array([len(record.labels) for record in train_set.records])
    images = np.flatnonzero(counts)
    if not len(images):
        return DrawnObjects(np.zeros((0, 2)), np.zeros((0, 2)))
    images = images[:: -(-len(images) // SAMPLED)]
    boxes = np.concatenate([train_set.records[image].boxes_xyxy_px for image in images])
    sizes, crops = [], []
    for epoch in range(-(-SAMPLED // len(images))):
        drawn = train_set.augmentations(epoch, images)
        scales = drawn.sizes / (drawn.crop_boxes[:, 2:] - drawn.crop_boxes[:, :2])
        scales, drawn_sizes = (np.repeat(each[:, ::-1], counts[images], axis=0) for each in (scales, drawn.sizes))
        sizes.append((boxes[:, 2:] - boxes[:, :2]) * scales)
        crops.append(drawn_sizes)
    return DrawnObjects(np.concatenate(sizes), np.concatenate(crops))
