"""The data set that a detector is evaluated on, with labels that are the detector's."""

from detr_fast.config import UserError, require
from detr_fast.data.categories import UnknownCategories, spelling
from detr_fast.data.checks import warn_before_evaluation
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.detector import Detector
from detr_fast.options import EvaluateOptions


def evaluation_dataset(detector: Detector, options: EvaluateOptions) -> CocoDataset:
    """Read the split that `options` name, labelled as the detector's classes are.

    Raises UserError where the data has classes that it does not know.
    """
    raw_ids = detector.categories is None
    try:
        dataset = build_dataset(
            options.dataset, options.split, detector.config, categories=detector.categories, raw_ids=raw_ids
        )
    except UnknownCategories as error:
        raise UserError(f"{error} {ways_on(detector, error)}") from error
    require(
        dataset.num_classes <= detector.config.num_classes,
        f"{dataset.annotation_file} has category ids up to {dataset.num_classes - 1}, but {options.weights} has "
        f"{detector.config.num_classes} classes and does not say which. Evaluate it on the data it was trained on, or "
        "name its classes with --categories FILE.json.",
    )
    warn_before_evaluation(dataset)
    return dataset


def ways_on(detector: Detector, error: UnknownCategories) -> str:
    """Say what to do where the detector has other classes than the data."""
    known = {spelling(category.name) for category in detector.categories or ()}
    if all(spelling(one.name) in known for one in error.unknown):
        return f"The names agree: --categories {error.file} gives their ids."
    return " ".join([*detector.notes, f"Weights that were trained on this data take --categories {error.file}."])
