"""Options and configurations: misspelt or senseless ones are refused by name (docs/faults.md, row 36)."""

from dataclasses import fields
from typing import get_args

import pytest
import torch
from detr_kernels import OPERATIONS
from detr_profiling.ladder import LadderOptions
from detr_profiling.parity import ParityOptions
from detr_profiling.trace import TraceOptions
from detr_profiling.tune import TuneOptions
from detr_profiling.workload import OpenRuntimeOptions, WorkloadOptions, WorkloadRuntimeOptions

from detr_fast import train
from detr_fast.command import run
from detr_fast.config import MODELS, ModelConfig, UserError, model_config
from detr_fast.option_groups import Options, default_of
from detr_fast.options import (
    LIMITS,
    Attention,
    EvaluateOptions,
    Kernels,
    OptimizerOptions,
    PredictOptions,
    TrainOptions,
)
from detr_fast.training.recipes import RECIPES


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


def test_options_are_composed_of_groups_and_flat_for_a_command_line_and_a_file() -> None:
    """By name, whatever group each is in; so no two groups have one of the same name."""
    for kind in (
        TrainOptions,
        EvaluateOptions,
        PredictOptions,
        TraceOptions,
        ParityOptions,
        LadderOptions,
        TuneOptions,
    ):
        groups = [each for each in map(default_of, fields(kind)) if isinstance(each, Options)]
        parts = [kind, *(part for group in groups for part in group.parts())]
        own = sum(not isinstance(default_of(each), Options) for part in parts for each in fields(part))
        assert len(kind.field_types()) == own
    recipe = RECIPES["tiny"]
    changed = recipe.but(lr=1.0, seed=3, train_sizes=(7,))
    assert (changed.optimizer.lr, changed.seed, changed.augmentation.train_sizes) == (1.0, 3, (7,))
    assert changed.optimizer.epochs == recipe.optimizer.epochs and changed.network == recipe.network
    assert TrainOptions.of(lr=1.0, seed=3) == TrainOptions(optimizer=OptimizerOptions(lr=1.0), seed=3)
    assert changed.to_dict() == recipe.to_dict() | {"lr": 1.0, "seed": 3, "train_sizes": (7,)}
    with pytest.raises(TypeError, match="no option leraning_rate"):
        recipe.but(leraning_rate=1.0)
    with pytest.raises(UserError, match=r"'wieght_decay'.*'weight_decay'"):
        TrainOptions.from_dict(recipe.to_dict() | {"wieght_decay": 0.0})


def test_a_group_has_groups_and_stays_of_the_class_that_its_command_has() -> None:
    tune, ladder = TuneOptions.of(model="detr_tiny", seed=3), LadderOptions.of(runs=9, size="32x32", device="cpu")
    assert (tune.workload.network.model, tune.workload.seed, ladder.timing.runs) == ("detr_tiny", 3, 9)
    assert tune.but(threads=2).workload.runtime == OpenRuntimeOptions(threads=2)
    assert TuneOptions.field_types()["compile"] == bool | None and LadderOptions.field_types()["compile"] is bool
    assert (
        tune.workload.runtime.asked() == {} and ladder.but(compile=False).workload.runtime.asked()["compile"] is False
    )
    measured = ladder.workload.resolved()
    assert type(measured.runtime) is WorkloadRuntimeOptions and measured.runtime.compile
    assert WorkloadOptions.from_dict(measured.to_dict()) == measured


def test_backends_asked_for_by_name_are_those_of_the_registry() -> None:
    assert set(get_args(Attention)) == {"auto", *OPERATIONS["attention"].names}
    known = {name for operation in OPERATIONS.values() for name in operation.names}
    assert {"auto", "ref"} < set(get_args(Kernels)) <= {"auto", *known}


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'detr_r5'.*'detr_r50'"):
        model_config("detr_r5")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *((name, 32) for name in ("tf_efficientnet_lite1", "dm_nfnet_f0", "nasnetalarge", "maxvit_tiny_tf_224")),
        *((name, 1) for name in ("resnet18", "efficientnet_lite0", "mobilenetv3_small_050", "eca_nfnet_l0")),
    ],
)
def test_a_backbone_that_pads_by_the_size_has_images_padded(name: str, step: int) -> None:
    """TensorFlow's "same" convolutions; timm's names do not always tell."""
    assert model_config(name).size_divisible == step
    assert model_config(name, size_divisible=7).size_divisible == 7


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
def test_the_command_answers_a_mistake_with_one_message_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: tests/test_backends.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ending:
        run(train.main, TrainOptions, train.default_options, arguments)
    printed = capsys.readouterr()
    assert ending.value.code == 2 and message in printed.out + printed.err
