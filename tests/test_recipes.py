"""Tests of recipes: which options a run has where nothing else is asked for."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from detr_fast.check_data import default_options as judged_defaults
from detr_fast.options import TrainOptions
from detr_fast.train import default_options
from detr_fast.training.recipes import DRAWN, RECIPES, SMALL_SIDE_PX, recipe_of

DOCUMENT = Path(__file__).parents[1] / "docs/recipes.md"


@pytest.mark.parametrize(
    ("line", "recipe", "model"),
    [
        ("--data photographs", "paper", "detr_r50"),
        ("--data photographs --model detr_lite", "small", "detr_lite"),
        ("--data photographs --model detr_lite --recipe paper", "paper", "detr_lite"),
        ("--data photographs --model detr_r50 --recipe small", "small", "detr_r50"),
        ("--data shapes:64 --model detr_tiny", "tiny", "detr_tiny"),
        ("--data shapes:96 --model detr_tiny --recipe paper", "paper", "detr_tiny"),
    ],
)
def test_a_model_has_its_recipe_unless_another_is_asked_for(line: str, recipe: str, model: str) -> None:
    options = default_options(line.split())
    assert (options.recipe, options.network.model) == (recipe, model)
    assert options.optimizer == RECIPES[options.recipe].optimizer
    assert (options.network.backbone_weights == "none") == (model == "detr_tiny")


def test_the_paper_s_recipe_is_what_options_are_without_one() -> None:
    assert RECIPES["paper"] == TrainOptions() == recipe_of("detr_r50", "photographs")


@pytest.mark.parametrize(
    ("given", "side"), [([], SMALL_SIDE_PX), (["--image-size", "384"], 384), (["--image-size", "200"], 200)]
)
def test_sizes_of_small_recipe_are_around_the_image_size(given: list[str], side: int) -> None:
    options = default_options(["--data", "photographs", "--model", "detr_lite", *given])
    drawn, largest = options.augmentation, options.dataset.max_size
    assert options.dataset.image_size == side and largest == 1.75 * side
    assert min(drawn.train_sizes) < mean(drawn.train_sizes) < side < max(drawn.train_sizes) < largest
    assert max(drawn.train_sizes) == pytest.approx(4 / 3 * side, abs=1) and len(set(drawn.train_sizes)) == 15
    assert drawn.crop_range[0] < drawn.crop_sizes[0] < side < drawn.crop_range[1] < largest


@pytest.mark.parametrize("size", ["none", "1e3", "-4", ""])
def test_an_image_size_that_is_none_is_left_to_the_parser(size: str) -> None:
    assert default_options(["--data", "photographs", "--model", "detr_lite", "--image-size", size]) == recipe_of(
        "detr_lite", "photographs"
    )


def test_the_embedded_data_set_is_seen_whole_and_a_few_times() -> None:
    options = default_options([])
    assert (options.dataset.data, options.network.model, options.recipe) == ("shapes:128", "detr_lite", "small")
    assert options.augmentation.train_sizes == (128,) and not options.augmentation.crop_sizes
    assert {name: options.to_dict()[name] for name in DRAWN} == DRAWN
    told = re.sub(r"\s+", " ", DOCUMENT.read_text())
    assert all(f"`--{name.replace('_', '-')} {value}`" in told for name, value in DRAWN.items())


def test_other_recipes_keep_their_sizes() -> None:
    """DETR's do not follow --image-size, which is of the evaluation alone."""
    named: dict[str, Any] = {"model": "detr_r50", "data": "photographs"}
    assert recipe_of(**named, image_size=400) == recipe_of(**named)
    assert recipe_of("detr_tiny", "shapes:96").augmentation.train_sizes == (96,)
    assert recipe_of("detr_lite", "shapes:96").dataset.image_size == 96


def test_the_document_has_every_value_of_the_small_recipe() -> None:
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE))
    usual, small = TrainOptions().to_dict(), RECIPES["small"].to_dict()
    given = {name: value for name, value in small.items() if value != usual[name] and name not in ("recipe", "model")}
    assert rows.keys() == {f"--{name.replace('_', '-')}" for name in given}
    for name, value in given.items():
        row = rows[f"--{name.replace('_', '-')}"]
        if name == "train_sizes":
            assert row == f"{value[0]} to {value[-1]} in steps of {value[1] - value[0]}"
        else:
            assert row == (" ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def test_the_command_that_judges_a_run_has_its_recipe() -> None:
    line = ["--data", "photographs", "--model", "detr_r50", "--recipe", "small"]
    judged, run = judged_defaults(line), default_options(line)
    assert judged.recipe == judged.training().recipe == "small"
    assert (judged.network, judged.optimizer, judged.augmentation) == (run.network, run.optimizer, run.augmentation)
