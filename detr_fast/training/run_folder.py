"""A run's output folder: its layout, its lock, and checks before the first step."""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from detr_fast.config import UserError, require
from detr_fast.files import open_growing, require_writable, sweep_partial
from detr_fast.paths import kind_of

BYTES = re.compile("[\ud800-\udfff]")
"""Characters that Python puts for bytes that are no UTF-8."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of everything that a run writes."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def trace(self) -> Path:
        return self.root / "trace.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def plots(self) -> Path:
        return self.root / "plots"

    @property
    def last(self) -> Path:
        return self.root / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        return self.root / "checkpoints" / "best.pt"


@contextmanager
def held_run_folder(root: Path, resuming: bool, checkpoint_bytes: int) -> Iterator[RunFolder]:
    """Make the folder, and lock it until the context, or the process, ends.

    Raises UserError where it cannot be written, has no space for the checkpoints, is held by another run, or holds an
    earlier run that is not being resumed.
    """
    folder = RunFolder(root)
    require(not BYTES.search(str(root)), f"--output {root}: the name is not UTF-8, as TensorBoard needs. Give another.")
    for made in (root, folder.last.parent, folder.plots, folder.tensorboard):
        require_writable("--output", made)
    with open_growing(root / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output {root} is in use by another run. Give another folder.") from error
        require(
            resuming or kind_of(folder.last) == "nothing",
            f"--output {root} holds a run already. Continue it with --resume auto, or give another --output.",
        )
        sweep_partial(folder.last.parent)
        require_free_space(root, checkpoint_bytes)
        yield folder


def require_free_space(root: Path, checkpoint_bytes: int) -> None:
    """Raise UserError where last.pt, its successor while it is written, and best.pt do not fit on the disk."""
    free, needed = shutil.disk_usage(root).free, 3 * checkpoint_bytes
    require(
        free >= needed,
        f"--output {root} has {free >> 20} MiB free and the checkpoints need {needed >> 20} MiB. "
        "Free some space or give another folder.",
    )
