"""Checkpoints survive kills and full disks, and damage is seen (docs/faults.md, rows 1 to 3)."""

import multiprocessing
import os
import resource
import signal
import struct
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType

import pytest
import torch

from detr_fast.config import UserError
from detr_fast.files import sweep_partial
from detr_fast.weights.container import is_container, read_container, write_container


def save(path: Path, step: int = 1, size: int = 1000) -> Path:
    write_container(path, {"model": torch.full((size,), float(step)), "step": step})
    return path


def test_what_is_saved_is_loaded_and_torch_reads_it_too(tmp_path: Path) -> None:
    path = save(tmp_path / "last.pt", step=3)
    assert read_container(path)["step"] == 3
    assert torch.equal(torch.load(path, weights_only=True)["model"], torch.full((1000,), 3.0))
    assert is_container(path)


MOMENTS = ((struct, "pack"), (os, "fsync"), (os, "replace"))
"""What a save calls amid the file, before that is safe on the disk, and before it takes the old one's place."""


def save_until(path: Path, owner: ModuleType, name: str, there: Event) -> None:
    """Saves twice, and once more until it calls the function `name`, where it stays."""

    def stay(*_: object) -> None:
        there.set()
        time.sleep(1000)

    torch.set_num_threads(1)  # the others of a pool are not forked: an operator would wait for them for ever
    for step in (0, 1, 2):
        if step == 2:
            setattr(owner, name, stay)
        save(path, step, size=500_000)


@pytest.mark.parametrize(("owner", "name"), MOMENTS, ids=[name for _, name in MOMENTS])
def test_a_kill_during_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path, owner: ModuleType, name: str) -> None:
    """Row 1."""
    path, fork = tmp_path / "last.pt", multiprocessing.get_context("fork")
    there = fork.Event()
    process = fork.Process(target=save_until, args=(path, owner, name, there))
    process.start()
    assert there.wait(120)
    process.kill()
    process.join()
    (partial,) = tmp_path.glob("*.partial")
    assert partial.name.startswith(f"last.pt.{process.pid}-")
    state = read_container(path)
    assert state["step"] == 1 and torch.equal(state["model"], torch.ones(500_000))
    sweep_partial(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_rest(tmp_path: Path) -> None:
    """Row 2. A file size limit stands for the disk's end: the write fails in the same place."""
    path = save(tmp_path / "last.pt", step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt cannot be written: File too large\. Free"):
            save(path, step=2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_container(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 0.995])
def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path, place: float) -> None:
    """Row 3: `torch.load` alone would accept most of these."""
    path = save(tmp_path / "last.pt")
    save(tmp_path / "best.pt")
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"last\.pt.*\n?.*best\.pt"):
        read_container(path)


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_cut_or_empty_file_is_found(tmp_path: Path, kept: int) -> None:
    """Row 3."""
    path = save(tmp_path / "last.pt")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"last\.pt"):
        read_container(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pt"):
        read_container(tmp_path / "none.pt")
