"""What lies at a path is told in one way, and where the system does not tell, that is a user's error."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detr_fast.config import UserError
from detr_fast.data.photographs import find_images
from detr_fast.data.splits import find_split
from detr_fast.options import DataOptions
from detr_fast.paths import kind_of
from detr_fast.training.resuming import load_resumed, resumed_path
from detr_fast.tuning import entries_of
from detr_fast.weights.files import read_weights_file


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("gone")
    os.mkfifo(tmp_path / "fifo")
    names = ("file", "link", "broken", "fifo", ".", "gone", "file/below")
    assert [kind_of(tmp_path / name) for name in names] == [
        *("file", "file", "broken link", "special file", "folder", "nothing", "nothing")
    ]


def test_a_cache_that_may_not_be_looked_at_has_no_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path / ("x" * 300)))
    assert list(entries_of(torch.device("cpu"))) == []


LONG, LOOP, CLOSED = "x" * 300, "loop", "closed/inside"


@pytest.mark.parametrize("name", [LONG, LOOP, CLOSED])
@pytest.mark.parametrize(
    "use",
    [
        lambda path: find_split(DataOptions(data=path), "train"),
        lambda path: find_split(DataOptions(train_images=path, train_annotations=path), "train"),
        lambda path: find_split(DataOptions(val_images=".", val_annotations=path), "val"),
        lambda path: find_images(Path(path)),
        lambda path: read_weights_file(Path(path)),
        lambda path: load_resumed(resumed_path(path, "runs")),
        lambda path: resumed_path("auto", path),
    ],
    ids=["data", "images", "annotations", "photographs", "weights", "resume", "output"],
)
def test_a_path_that_the_system_refuses_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, use: Callable[[str], object]
) -> None:
    """For root no folder is closed, so that the system's answer is planted."""
    (tmp_path / LOOP).symlink_to(LOOP)
    stat = os.stat

    def refusing(path: object, **options: bool) -> os.stat_result:
        if "closed/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)
    with pytest.raises(UserError, match=r"cannot be looked at: (File name too long|Too many levels|Permission denied)"):
        use(str(tmp_path / name))
