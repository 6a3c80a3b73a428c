"""Recipes: the options that a model is trained with on some data, where nothing else is asked for."""

from dataclasses import replace

from detr_fast.config import RECIPES, TrainConfig
from detr_fast.data.shapes import is_shapes, parse_shapes


def recipe_of(model: str | None, data: str | None) -> TrainConfig:
    """Return the recipe of `model` for `data`, a folder or shapes:SIDE; None stands for the default.

    Raises UserError for a SIDE that is no number from 48 to 1024.
    """
    data = data or TrainConfig.data
    if not is_shapes(data):
        return RECIPES.get(model or "", TrainConfig(model=model or TrainConfig.model))
    model, side = model or "detr_tiny", parse_shapes(data)
    recipe = RECIPES.get(model, TrainConfig(model=model))
    return replace(recipe, train_sizes=(side,), crop_sizes=(), image_size=side, max_size=side)
