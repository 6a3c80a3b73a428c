"""An output folder belongs to one run, and is checked before the first step (docs/faults.md, rows 2 and 9)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from detr_fast.config import UserError
from detr_fast.training.metrics_log import MetricsLog, read_rows
from detr_fast.training.run_folder import held_run_folder

SEMICOLONS = b"kind;epoch;step;seconds\ntrain;1;2;3\n"
FLOATS = b"kind,epoch,step,seconds\ntrain,1,2.0,3\ntrain,1,4.0,5\n"
HOLD = """
import sys, time
from pathlib import Path
from detr_fast.training.run_folder import held_run_folder
with held_run_folder(Path(sys.argv[1]), resuming=False, checkpoint_bytes=0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Row 9, and the lock of a killed run does not stay."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match="in use by another run"), held_run_folder(tmp_path, False, 0):
            pass
    finally:
        process.kill()
        process.wait()
    with held_run_folder(tmp_path, False, 0) as folder:
        assert folder.last.parent.is_dir()


def test_an_earlier_run_is_not_overwritten(tmp_path: Path) -> None:
    with held_run_folder(tmp_path, False, 0) as folder:
        folder.last.write_bytes(b"")
    with pytest.raises(UserError, match="--resume auto"), held_run_folder(tmp_path, False, 0):
        pass
    with held_run_folder(tmp_path, True, 0):
        pass


def test_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    """Row 1."""
    with held_run_folder(tmp_path, False, 0) as folder:
        leftover = folder.last.with_name("last.pt.partial")
        leftover.write_bytes(b"half")
    with held_run_folder(tmp_path, False, 0):
        assert not leftover.exists()


def test_no_room_for_the_checkpoints_is_said_before_training(tmp_path: Path) -> None:
    """Row 2."""
    with pytest.raises(UserError, match="MiB free"), held_run_folder(tmp_path, False, 2**60):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Row 2. A file in the folder's place: root may write into read-only folders, so those cannot be tried
    everywhere."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), held_run_folder(tmp_path / "file" / "run", False, 0):
        pass


@pytest.mark.parametrize("content", [SEMICOLONS, b"\xff\xfek\0i\0", b"a,b\n1,2\n", FLOATS])
def test_metrics_that_another_program_has_rewritten_are_named_and_kept(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "metrics.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.csv .*move it away"):
        MetricsLog(file, tmp_path / "tensorboard", ("AP",), resumed_step=2)
    assert file.read_bytes() == content


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(UserError, match=r"caf.*not UTF-8"), held_run_folder(root, False, 0):
        pass
    assert not root.exists()


def test_a_torn_last_row_and_a_byte_order_mark_lose_no_other_row(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("\ufeffkind,epoch,step,seconds\ntrain,1,2,3\ntrain,1,4,5\ntrain,1", encoding="utf-8")
    MetricsLog(file, tmp_path / "tensorboard", ("AP",), resumed_step=4).close()
    assert [row["step"] for row in read_rows(file)] == ["2", "4"]
