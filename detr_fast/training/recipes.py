"""Recipes: the options that a model is trained with on some data, where nothing else is asked for."""

import argparse
from collections.abc import Sequence

from detr_fast.data.shapes import is_shapes, parse_shapes
from detr_fast.options import RECIPES, DataOptions, NetworkOptions, TrainOptions


def recipe_of(model: str | None, data: str | None) -> TrainOptions:
    """Return the recipe of `model` for `data`, a folder or shapes:SIDE; None stands for the default.

    Raises UserError for a SIDE that is no number from 48 to 1024.
    """
    data = data or DataOptions.data
    if not is_shapes(data):
        return RECIPES.get(model or "", TrainOptions.of(model=model or NetworkOptions.model))
    model, side = model or "detr_tiny", parse_shapes(data)
    recipe = RECIPES.get(model, TrainOptions.of(model=model))
    return recipe.but(train_sizes=(side,), crop_sizes=(), image_size=side, max_size=side)


def recipe_asked(argv: Sequence[str]) -> TrainOptions:
    """Return the recipe of the model and the data that a command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--train-images", "--model"):
        parser.add_argument(name)
    asked, _ = parser.parse_known_args(argv)
    return recipe_of(asked.model, asked.train_images or asked.data)
