"""Recipes as data: the options that a model is trained with where nothing else is asked for."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from detr_fast.data.shapes import is_shapes, parse_shapes
from detr_fast.options import (
    AugmentationOptions,
    DataOptions,
    NetworkOptions,
    OptimizerOptions,
    Recipe,
    TrainOptions,
)

SMALL_SIDE_PX = 288
"""Shorter side of images in the recipe for small data sets, where none is asked for: 256 in training on average."""


def small_sizes(side_px: int) -> dict[str, Any]:
    """Return the sizes of the recipe for small data sets around images of the shorter side `side_px`.

    Training has smaller images on average, whose crops are enlarged: their objects look as large as those of evaluation
    (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
    """

    def times(*eighteenths: int) -> tuple[int, ...]:
        return tuple(round(side_px * each / 18) for each in eighteenths)

    return {
        "image_size": side_px,
        "max_size": 7 * side_px // 4,
        "train_sizes": times(*range(10, 25)),
        "crop_sizes": times(16),
        "crop_range": times(11, 21),
    }


DRAWN: dict[str, Any] = {"epochs": 4, "lr": 1e-3, "num_queries": 20, "groups": 1, "eval_every": 1}
"""Values that the recipe for small data sets has on the embedded one, whose 8,000 images are drawn."""
RECIPES: dict[Recipe, TrainOptions] = {
    "paper": TrainOptions(),
    "small": TrainOptions(
        recipe="small",
        network=NetworkOptions(model="detr_lite"),
        optimizer=OptimizerOptions(
            epochs=30,
            batch_size=8,
            lr=7e-4,
            lr_backbone=2e-4,
            schedule="cosine",
            warmup_steps=60,
            ema=0.998,
            class_loss="varifocal",
            groups=3,
        ),
        eval_every=10,
        log_every=20,
    ).but(**small_sizes(SMALL_SIDE_PX)),
    "tiny": TrainOptions(
        recipe="tiny",
        network=NetworkOptions(model="detr_tiny", backbone_weights="none"),
        optimizer=OptimizerOptions(epochs=6, lr=5e-4, lr_backbone=5e-4, schedule="cosine", warmup_steps=200),
        augmentation=AugmentationOptions(train_sizes=(64,), crop_sizes=()),
        eval_every=3,
        log_every=20,
    ),
}
USUAL: dict[str, Recipe] = {recipe.network.model: name for name, recipe in RECIPES.items() if name != "paper"}
"""A model's recipe; of every other model the paper's."""


def recipe_of(
    model: str | None, data: str | None, recipe: str | None = None, image_size: int | None = None
) -> TrainOptions:
    """Return the options of `recipe` for `model` on `data`, a folder or shapes:SIDE; None stands for the default.

    `image_size`: the shorter side that is asked for, around which the sizes of "small" are. Raises UserError for a SIDE
    that is no number from 48 to 1024.
    """
    data = data or DataOptions.data
    side = parse_shapes(data) if is_shapes(data) else None
    model = model or (NetworkOptions.model if side is None else "detr_lite")
    chosen: Recipe = next((name for name in get_args(Recipe) if name == recipe), USUAL.get(model, "paper"))
    pretrained = "none" if model == "detr_tiny" else NetworkOptions.backbone_weights
    options = RECIPES[chosen].but(model=model, backbone_weights=pretrained)
    if side is not None:
        drawn = DRAWN if chosen == "small" else {}
        return options.but(train_sizes=(side,), crop_sizes=(), image_size=side, max_size=side, **drawn)
    return options.but(**small_sizes(image_size or SMALL_SIDE_PX)) if chosen == "small" else options


def recipe_asked(argv: Sequence[str]) -> TrainOptions:
    """Return the recipe of the model and the data that a command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--train-images", "--model", "--recipe", "--image-size"):
        parser.add_argument(name)
    asked, _ = parser.parse_known_args(argv)
    side = int(asked.image_size) if (asked.image_size or "").isdecimal() else None  # what is not is refused later
    return recipe_of(asked.model, asked.train_images or asked.data, asked.recipe, side)
