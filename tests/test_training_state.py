"""What a run saves to go on is what it loads: one schema, its versions, and read once."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_fast.config import UserError
from detr_fast.training import checkpoint
from detr_fast.training.checkpoint import VERSION, Progress, TrainingState
from detr_fast.training.resuming import load_resumed, resumed_options
from detr_fast.weights.container import read_container, write_container
from tests.factories import begun, state_of


@pytest.fixture
def stored(shapes_root: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    optimizer = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"params": [0]}]}
    weights = {"model": {"a": torch.ones(2)}, "ema": {"a": torch.zeros(2)}}
    replace(state_of(begun(shapes_root)), optimizer=optimizer, progress=PROGRESS, **weights).save(path)
    return path


PROGRESS = Progress(step=3, evaluated_step=2, best_ap=0.25, nonfinite_readings=1, seconds=7.5)


def test_a_checkpoint_of_another_version_is_named(stored: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "last.pt", read_container(stored)
    write_container(path, {"optimizer": {}, "options": {}})
    with pytest.raises(UserError, match=r"another version.*lacks .*processes.*--weights"):
        load_resumed(path)
    empty: Any
    for empty in ({}, 5, None):
        write_container(path, dict.fromkeys(whole, empty))
        with pytest.raises(UserError, match=r"another version.*lacks optimizer\.state.*--weights"):
            load_resumed(path)
    write_container(path, whole | {"version": VERSION + 1})
    with pytest.raises(UserError, match=rf"another version.*, {VERSION + 1} of checkpoints.*--weights"):
        load_resumed(path)
    for part in ("options", "progress"):  # a word that only a later version knows
        write_container(path, whole | {part: whole[part] | {"unheard_of": 1}})
        with pytest.raises(UserError, match=r"last\.pt was written by another version.*unheard_of.*--weights"):
            load_resumed(path)


def test_an_option_that_came_later_keeps_its_default(stored: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "last.pt", read_container(stored)
    later = {"profile", "host_allocator"}
    options = {name: value for name, value in whole["options"].items() if name not in later}
    write_container(path, whole | {"options": options})
    state, expected = load_resumed(path), load_resumed(stored)
    assert state is not None and expected is not None and state.options == expected.options


def test_what_is_saved_is_what_is_loaded(stored: Path, shapes_root: Path) -> None:
    """Every field of the one schema; and files from before it had a version, or what was measured, go on."""
    whole, loaded = read_container(stored), load_resumed(stored)
    expected = replace(state_of(begun(shapes_root)), progress=PROGRESS)
    assert whole.keys() == {each.name for each in fields(TrainingState)}
    assert loaded is not None and torch.equal(loaded.model["a"], torch.ones(2))
    assert loaded.ema is not None and torch.equal(loaded.ema["a"], torch.zeros(2))
    bare: dict[str, Any] = {"model": {}, "optimizer": {}, "ema": None}
    assert replace(loaded, **bare) == expected
    write_container(stored, {name: value for name, value in whole.items() if name not in ("version", "tuning")})
    older = load_resumed(stored)
    assert older is not None and replace(older, **bare) == expected


def test_a_command_reads_its_checkpoint_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its options and then for its run; what was written since is read again."""
    read: list[Path] = []
    monkeypatch.setattr(checkpoint, "read_container", lambda path: read.append(path) or read_container(path))
    resumed = resumed_options(stored, data_asked=False)
    state = load_resumed(stored)
    assert state is not None and state.options.optimizer.lr == resumed.optimizer.lr and len(read) == 1
    load_resumed(stored)
    assert len(read) == 2  # it was handed over, not kept
    resumed_options(stored, data_asked=False)
    replace(state, processes=7).save(stored)
    again = load_resumed(stored)
    assert again is not None and again.processes == 7 and len(read) == 4
