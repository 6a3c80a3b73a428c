"""An option that is given and has no effect is refused, with the option that takes its effect away and what to do."""

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from detr_profiling import __main__ as profiling
from detr_profiling import race
from detr_profiling.accuracy import AccuracyOptions
from detr_profiling.ladder import LadderOptions
from detr_profiling.parity import ParityOptions
from detr_profiling.race import RaceOptions
from detr_profiling.trace import TraceOptions
from detr_profiling.tune import TuneOptions

from detr_fast import check_data
from detr_fast.check_data import CheckDataOptions
from detr_fast.command import run
from detr_fast.config import MODELS, UserError
from detr_fast.data.coco import build_dataset
from detr_fast.option_groups import Idle, Options, default_of
from detr_fast.options import DataOptions, EvaluateOptions, PredictOptions, TrainOptions
from detr_fast.train import default_options
from tests.test_flags import flags

WEIGHTS = "--weights w.pth "
TRAIN, VAL = "--train-images t --train-annotations t.json ", "--val-images v --val-annotations v.json "
RUNTIME = [("--kernels ref --tune", "--kernels ref --no-tune")]
WORKLOAD = [
    ("--no-buckets", "--no-buckets --size-mix mixed"),
    ("--mode inference --objects 3", "--objects 3"),
    ("--mode inference --dropout 0.1", "--dropout 0.1"),
    ("--capture --device cpu", "--no-capture --device cpu"),
]
"""Of every command that measures a workload."""
SHARED = [
    ("--minutes 3 --epochs 3", "--minutes 3"),
    ("--schedule cosine --lr-drop 3", "--schedule step --lr-drop 3"),
    ("--crop-range 3 4", "--crop-range 3 4 --crop-sizes 5"),
    ("--min-visible 0.4", "--min-visible 0.4 --mosaic 0.5"),
    ("--compose-epochs 1 3", "--compose-epochs 1 3 --mixup 0.5"),
    (WEIGHTS + "--backbone-weights none", "--backbone-weights none"),
    ("--model detr_tiny --backbone-weights=imagenet", "--model detr_tiny --backbone-weights=file.pth"),
]
"""Lists those of `train` and of the command that judges such a run."""
CASES: dict[type, list[tuple[str, str]]] = {
    TrainOptions: [
        *RUNTIME,
        (TRAIN + VAL + "--data d", TRAIN + "--data d"),
        *SHARED,
        ("--profile 3 --data-only", "--profile 3"),
        ("--model detr_tiny --class-loss varifocal", "--model detr_lite --class-loss varifocal"),
        ("--train-sizes 48 256", "--train-sizes 48 256 --max-size 256"),
    ],
    CheckDataOptions: [("--images-per-second 3", "--images-per-second 3 --minutes 3"), *SHARED],
    EvaluateOptions: [
        *((WEIGHTS + each, WEIGHTS + other) for each, other in RUNTIME),
        (WEIGHTS + TRAIN, WEIGHTS + TRAIN + "--split train"),
        (WEIGHTS + VAL + "--split train", WEIGHTS + VAL),
        (WEIGHTS + TRAIN + "--split train --data d", WEIGHTS + TRAIN + "--split train"),
        (WEIGHTS + VAL + "--data d", WEIGHTS + "--data d"),
    ],
    PredictOptions: [("a.jpg " + WEIGHTS + each, "a.jpg " + WEIGHTS + other) for each, other in RUNTIME],
    TraceOptions: [
        ("--no-buckets", "--no-buckets --data shapes:64"),
        *WORKLOAD[1:],
        ("--data shapes:64 --objects 3", "--objects 3"),
    ],
    LadderOptions: WORKLOAD[:3],
    AccuracyOptions: [("--val-fraction 0.3", "--val-fraction 0.3 --data d")],
    RaceOptions: [
        *WORKLOAD,
        ("--same-settings --device cuda", "--same-settings --device cpu"),
        ("--compiled-baseline", "--no-compiled-baseline"),
    ],
    TuneOptions: [*WORKLOAD, ("--data shapes:64 --size 3x4", "--size 3x4")],
    ParityOptions: [
        WORKLOAD[1],
        WORKLOAD[3],
        ("--batch-size 5", "--batch-size 4"),
    ],
}
"""For each row of a table a command line that it refuses, and the nearest one that passes."""


def idle_of(options_type: type[Options]) -> list[tuple[type[Options], Idle]]:
    """The rows of its own table and of its groups', each with whose it is, of options that it has."""
    there = {word for line in flags(options_type) for word in line.split()}
    groups = (group for each in fields(options_type) if isinstance(group := default_of(each), Options))
    parts = [options_type, *(type(part) for group in groups for part in group.parts())]
    return [(part, one) for part in parts for one in part.idle if f"--{name_of(one)}" in there]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU and without a compiler; no earlier run in the output folder."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(race, "missing_for_compile", lambda: "there is no compiler")
    monkeypatch.chdir(tmp_path)


DEFAULTS: dict[type, Callable] = {TrainOptions: default_options, CheckDataOptions: check_data.default_options}


def answer(options_type: type, arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the message of a command that does nothing."""
    default: Callable | None = DEFAULTS.get(options_type)
    with pytest.raises(SystemExit) as ending:
        run(lambda options: 0, options_type, default, arguments.split())
    return int(str(ending.value.code)), capsys.readouterr().err


@pytest.mark.parametrize("options_type", CASES)
def test_each_row_of_the_tables_refuses_its_option(options_type: type, capsys: pytest.CaptureFixture[str]) -> None:
    messages = []
    for refused, passed in CASES[options_type]:
        code, message = answer(options_type, refused, capsys)
        assert code == 2, refused
        messages.append(message.removeprefix("error: ").strip())
        assert answer(options_type, passed, capsys) == (0, ""), passed
    assert set(messages) == {one.message() for _, one in idle_of(options_type)}


def test_a_table_names_options_that_there_are_and_says_what_to_do() -> None:
    for options_type in CASES:
        for part, one in idle_of(options_type):
            assert one.option in part.field_types()
            assert len(one.why.split(":")) == 2 and one.message().endswith(f"or leave --{name_of(one)} out.")


def name_of(one: Idle) -> str:
    return one.option.replace("_", "-")


def test_what_is_not_given_is_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipes' own combinations, and values that look like options' names."""
    assert answer(TrainOptions, "--schedule cosine --output lr-drop --model detr_tiny", capsys) == (0, "")
    assert answer(TrainOptions, "--no-object-weight 0.2 --no-tune", capsys) == (0, "")


def test_every_command_with_a_table_is_tried() -> None:
    for command in profiling.COMMANDS.values():
        options_type = getattr(import_module(command.module), str(command.options))
        assert options_type in CASES or not idle_of(options_type)


@pytest.mark.parametrize(
    ("options_type", "arguments"),
    [
        *((kind, f"{WEIGHTS}--seed 1") for kind in (EvaluateOptions, PredictOptions)),
        *((CheckDataOptions, arguments) for arguments in ("--device cpu", "--output o", "--seed 1")),
        *((kind, "--no-tune") for kind in (TraceOptions, LadderOptions)),
        *((kind, "--size-mix mixed") for kind in (TraceOptions, ParityOptions)),
        *((ParityOptions, arguments) for arguments in ("--no-buckets", "--dropout 0.1")),
        (LadderOptions, "--no-capture"),
        (RaceOptions, "--no-leave-one-out"),
    ],
)
def test_an_option_that_never_has_an_effect_is_not_there(options_type: type, arguments: str) -> None:
    with pytest.raises(SystemExit) as ending:
        run(lambda options: 0, options_type, argv=arguments.split())
    assert ending.value.code == 2


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *((kind, values) for kind in (TrainOptions, DataOptions) for values in ({"image_size": 128}, {"max_size": 32})),
        (DataOptions, {"image_size": 0}),
    ],
)
def test_an_image_size_above_the_largest_is_refused(kind: Any, values: dict[str, int], shapes_root: Path) -> None:
    options = kind.of(data=str(shapes_root), **values)
    model = default_options(["--model", "detr_tiny"])
    for split in ("train", "val"):
        with pytest.raises(UserError, match=r"image_size \d+ must be between 1 and max_size \d+"):
            build_dataset(options, split, MODELS[model.network.model])
