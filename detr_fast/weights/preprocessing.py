"""Conversion between Hugging Face's preprocessor_config.json and our configuration of a model's input.

Its keys are DetrImageProcessor's, as transformers 4 and 5 write and read them.
"""

import math
from typing import Any

from detr_fast.config import ModelConfig, UserError, require
from detr_fast.weights.files import PREPROCESSOR_CONFIG, WeightsFile
from detr_fast.weights.pickles import brief

BILINEAR = 2
"""Pillow's number of it."""
TO_UNIT = 1 / 255
LARGEST = 1e6
"""Beyond what any statistics of pixels are, also of 16 bits; its inverse is less than what scales these."""


def preprocessor_config(config: ModelConfig) -> dict[str, Any]:
    """Return what transformers' DetrImageProcessor needs to make the input that a model with `config` expects."""
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size, "longest_edge": config.max_size},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": TO_UNIT,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_pad": True,
    }


def preprocessed(file: WeightsFile) -> dict[str, Any]:
    """Return the fields of ModelConfig that the preprocessor_config.json states; none where there is no such file.

    Raises UserError that names a key whose value cannot be followed here.
    """
    said = {key: value for key, value in file.preprocessor.items() if value is not None}
    if not said:
        return {}
    only = {"do_resize": True, "resample": BILINEAR, "do_center_crop": False}
    for key, value in only.items():
        require(said.get(key, value) == value, refused(file, key, said.get(key), f"only {value} can be followed"))
    image_size, max_size = edges(file, said)
    mean, std = statistics(file, said)
    return {"image_size": image_size, "max_size": max_size, "image_mean": mean, "image_std": std}


def edges(file: WeightsFile, said: dict[str, Any]) -> tuple[int, int]:
    """Return the shorter side and the longer side's bound in pixels; 800 and 1333 by default, as in transformers."""
    default = ModelConfig()
    size = said.get("size", default.image_size)
    if isinstance(size, dict):
        shorter, longer = size.get("shortest_edge"), size.get("longest_edge")
    else:
        shorter, longer = size, said.get("max_size", default.max_size)
    if type(shorter) is int and type(longer) is int and 1 <= min(shorter, longer) <= max(shorter, longer) < 1 << 31:
        return min(shorter, longer), longer
    what = "only shortest_edge and longest_edge, which keep the aspect ratio, can be followed"
    raise UserError(refused(file, "size", size, what))


def statistics(file: WeightsFile, said: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels that are scaled to [0, 1], whatever the file scales them by."""
    default, found = ModelConfig(), []
    for key, neutral in (("image_mean", 0.0), ("image_std", 1.0)):
        values = said.get(key, getattr(default, key)) if said.get("do_normalize", True) else neutral
        values = tuple(values) if isinstance(values, list | tuple) else (values,) * 3
        least = -LARGEST if key == "image_mean" else 1 / LARGEST
        right = len(values) == 3 and all(between(least, value) for value in values)
        require(right, refused(file, key, said.get(key), "three numbers are needed, for image_std positive ones"))
        found.append(values)
    factor = said.get("rescale_factor", TO_UNIT) if said.get("do_rescale", True) else 1.0
    require(between(1 / LARGEST, factor), refused(file, "rescale_factor", factor, "a positive number is needed"))
    scale = TO_UNIT / factor  # (x * factor - mean) / std is (x / 255 - mean * scale) / (std * scale)
    if math.isclose(scale, 1, rel_tol=1e-6):
        scale = 1.0
    mean, std = (tuple(float(value) * scale for value in values) for values in found)
    return mean, std


def between(least: float, value: object) -> bool:
    """Tell whether `value` is a number, no less than `least` and of usual size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= LARGEST


def refused(file: WeightsFile, key: str, value: object, what: str) -> str:
    return f"{file.path}: its {PREPROCESSOR_CONFIG} has {key}={brief(value)}, and {what}: change it there."
