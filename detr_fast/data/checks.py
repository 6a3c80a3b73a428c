"""Checks for what is silently wrong with a data set, or worth a look: lines that say how many, which, what to do."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from detr_fast.config import UserError, require
from detr_fast.data.annotations import Annotations, Category
from detr_fast.data.categories import spelling
from detr_fast.data.coco import CocoDataset, ImageRecord, size_mismatch
from detr_fast.data.corrections import shortened
from detr_fast.data.decode import decode_file
from detr_fast.data.headers import Header, read_header

COCO_DETECTIONS = 100
"""Most detections of one class on an image that count in COCO's numbers."""
RARE_FACTOR = 100
"""A class with so many times fewer objects than another is rare."""
MOST_HEADERS = 32
"""Files of a split that are looked at before the first step."""
NAMED = 5
TRAINED_ON = "numbers measured on images that were trained on say nothing of new ones"


def without_objects(annotations: Annotations) -> str | None:
    """Say why no annotation is an object to train on or to find; None where one is."""
    if not annotations.crowd.all():
        return None
    corrections = annotations.corrections
    dropped = len(corrections.dropped_empty) + len(corrections.dropped_unlisted)
    crowds = len(annotations.ids)
    kinds = {
        "annotations have iscrowd 1, a group of objects (set it to 0 where they are single ones)": crowds,
        "annotations are dropped (no area inside their image, or of an image that is not listed)": dropped,
    }
    present = [f"{count} {text}" for text, count in kinds.items() if count]
    if not present:
        return "there are no annotations"
    return f"all {present[0]}" if len(present) == 1 else " and ".join(present)


def beyond_coco(annotations: Annotations) -> str | None:
    """Say how many images have more objects of a class than COCO's evaluation counts; None where there are none."""
    rows = np.flatnonzero(~annotations.crowd)
    images = np.searchsorted([image.id for image in annotations.images], annotations.image_ids[rows])
    classes = np.searchsorted([one.id for one in annotations.categories], annotations.category_ids[rows])
    groups, counts = np.unique(images * len(annotations.categories) + classes, return_counts=True)
    crowded = np.unique(groups[counts > COCO_DETECTIONS] // len(annotations.categories)).tolist()
    if not crowded:
        return None
    names = shortened([annotations.images[index].file_name for index in crowded], NAMED)
    return (
        f"{len(crowded)} images have more than {COCO_DETECTIONS} objects of one class (up to {counts.max()}; {names}): "
        f"COCO's numbers count an image's best {COCO_DETECTIONS} detections of a class, so that AP cannot reach 1. "
        "Evaluation gives AP without that limit beside them"
    )


def class_notes(annotations: Annotations) -> Iterator[str]:
    """Yield lines on classes that cannot be learned or measured well, and on names that are nearly the same."""
    classes = np.searchsorted([one.id for one in annotations.categories], annotations.category_ids)
    objects, crowds = (
        np.bincount(classes[mask], minlength=len(annotations.categories))
        for mask in (~annotations.crowd, annotations.crowd)
    )
    rare = (objects > 0) & (objects * RARE_FACTOR < objects.max())
    none = objects == 0
    kinds = {
        "classes have crowds alone (iscrowd 1), which are neither trained on nor measured": none & (crowds > 0),
        "classes have no object: not learned from this split, nor measured on it": none & (crowds == 0),
        f"classes have less than 1 object for {RARE_FACTOR} of the most frequent class": rare,
    }
    for text, mask in kinds.items():
        names = [f"{annotations.categories[k].name!r:.100}" for k in np.flatnonzero(mask).tolist()]
        if names and objects.any():
            yield f"{len(names)} {text}: {shortened(names, NAMED)}"
    yield from alike_names(annotations.categories)


def alike_names(categories: Sequence[Category]) -> Iterator[str]:
    first: dict[str, Category] = {}
    for category in categories:
        other = first.setdefault(spelling(category.name), category)
        if other is not category:
            yield (
                f"categories {other} and {category} differ in case or spaces at "
                "most: where they mean one class, give one id"
            )


def trained_on(train_set: CocoDataset, val_set: CocoDataset) -> str | None:
    """Say how many files of `val_set` are `train_set`'s as well; None where none is."""
    files = {record.path for record in train_set.records}
    shared = [record.path.name for record in val_set.records if record.path in files]
    if not shared:
        return None
    return f"{len(shared)} of {len(val_set)} images are trained on, too ({shortened(shared, NAMED)}): {TRAINED_ON}"


def check_files(dataset: CocoDataset) -> None:
    """Check before the first step that a few files can be read, have the annotations' size and are upright.

    Raises UserError where training could not go on; else warns.
    """
    file, records, skip = dataset.annotation_file, dataset.records, dataset.on_bad_image == "skip"
    some = [(record, read_header(record.path)) for record in records[:: -(-len(records) // MOST_HEADERS)]]
    if not skip:
        for record, header in some:
            require_usable(record, header)
    usable = [one for one, header in some if header and header.size == (one.height, one.width)]
    require(len(usable) > 0 or len(some) < len(records), f"{file}: no image can be used: check_data says why.")
    if not usable:
        warnings.warn(f"{file}: none of the {len(some)} images looked at can be used: check_data says why.")
    turned = [record.path.name for record, header in some if header and header.turned]
    if turned:
        warnings.warn(
            f"{file}: of {len(some)} images looked at, {len(turned)} have an EXIF orientation "
            f"({shortened(turned, NAMED)}), which is not applied: boxes must refer to the pixels as they are stored. "
            "check_data lists all."
        )


def require_usable(record: ImageRecord, header: Header | None) -> None:
    """Raise UserError where reading the image would."""
    if header is None:
        decode_file(record.path)
    elif header.size != (record.height, record.width):
        raise UserError(size_mismatch(record, header.size))


def warn_before_training(train_set: CocoDataset, val_set: CocoDataset) -> None:
    """Warn of what would make a run useless. Raises UserError as `check_files`."""
    check_files(train_set)
    reason = without_objects(train_set.annotations)
    if reason:
        warnings.warn(f"{train_set.annotation_file}: there is nothing to train on: {reason}.")
    shared = trained_on(train_set, val_set)
    if shared:
        warnings.warn(f"{val_set.annotation_file}: {shared}.")
    warn_before_evaluation(val_set, "; best.pt is then always the latest weights")


def warn_before_evaluation(dataset: CocoDataset, consequence: str = "") -> None:
    """Warn of what would make an evaluation say little. Raises UserError as `check_files`."""
    check_files(dataset)
    reason, limit = without_objects(dataset.annotations), beyond_coco(dataset.annotations)
    if reason:
        text = f"{dataset.annotation_file}: there is no object to find: {reason}. No AP is measured{consequence}."
        warnings.warn(text)
    if limit:
        warnings.warn(f"{dataset.annotation_file}: {limit}.")
