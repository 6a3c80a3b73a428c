"""Options and configurations: misspelt or senseless ones are refused by name (docs/faults.md, row 36)."""

import os
import subprocess
import sys
from typing import get_args

import pytest

from detr_fast.config import MODELS, ModelConfig, UserError, model_config
from detr_fast.options import LIMITS, RECIPES, TrainOptions


@pytest.mark.parametrize("config", [*MODELS.values(), *RECIPES.values()])
def test_a_configuration_survives_its_dict(config: ModelConfig | TrainOptions) -> None:
    assert type(config).from_dict(config.to_dict()) == config


def test_an_unknown_key_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'hiden_dim'.*'hidden_dim'"):
        ModelConfig.from_dict({"hiden_dim": 256})


@pytest.mark.parametrize("values", [{"num_heads": "8"}, {"image_mean": [0.5, 0.5]}, {"dilation": None}])
def test_a_value_of_another_type_is_refused_with_its_key(values: dict) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    "values", [{"num_queries": 0}, {"hidden_dim": 100}, {"dropout": 1.0}, {"image_size": 900, "max_size": 800}]
)
def test_senseless_sizes_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        ModelConfig(**values)


def test_every_number_has_limits() -> None:
    """And what is beyond, endless or no number at all is refused by name; so are sizes."""
    numbers = {name for name, kind in TrainOptions.field_types().items() if {int, float} & {kind, *get_args(kind)}}
    assert numbers - {"train_sizes", "crop_sizes", "crop_range"} == LIMITS.keys()
    for name, (least, most) in LIMITS.items():
        option = f"--{name.replace('_', '-')} must be at "
        for value in (least - 1, most * 2 if most < 1e300 else float("inf"), float("nan")):
            with pytest.raises(UserError, match=option):
                TrainOptions.of(**{name: value})
    for sizes in ({"train_sizes": (0,)}, {"crop_sizes": (-5,)}, {"crop_range": (9, 3)}):
        with pytest.raises(UserError, match="--" + next(iter(sizes)).replace("_", "-")):
            TrainOptions.of(**sizes)


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'detr_r5'.*'detr_r50'"):
        model_config("detr_r5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch-count", "3"], "--epoch"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--model", "detr_r5"], "Did you mean 'detr_r50'"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--device", "cuda"], "--device"),
    ],
)
def test_the_command_answers_a_mistake_with_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "detr_fast.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
