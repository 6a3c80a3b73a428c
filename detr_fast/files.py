"""Writing of files: whole or not at all, with one message where one cannot be written.

Nothing else opens a file for writing (tests/test_layout.py).
"""

import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from detr_fast.config import UserError, require

PARTIAL_SUFFIX = ".partial"
FREE_SPACE = "Free some space or give another folder."


@contextmanager
def atomic_write(path: Path, advice: str = FREE_SPACE) -> Iterator[BinaryIO]:
    """Replace `path` by what is written inside, in one step: a kill at any moment leaves the old file or the new one.

    Folders are made as needed; a link is followed, so that it stays one. Raises UserError that ends with `advice`
    where the file cannot be written, as where a device or a pipe has its name; the old one is then still there, and the
    partial one is gone.
    """
    target = Path(os.path.realpath(path))
    own = f"{os.getpid()}-{threading.get_ident()}"  # a thread's, since several may write one file
    partial = target.with_name(f"{target.name[:40]}.{own}{PARTIAL_SUFFIX}")  # not too long a name
    with explained(path, advice):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            require_replaceable(target)
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        finally:
            remove(partial)


def require_replaceable(target: Path) -> None:
    """Raise OSError for a device, a pipe or a folder: root could put a file in the place of /dev/null."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "it is a special file")


def write_text(path: Path, text: str, errors: str = "strict", advice: str = FREE_SPACE) -> None:
    """Replace `path` by `text` in UTF-8, as `atomic_write` does; `errors` as `str.encode` has it."""
    data = text.encode(errors=errors)
    with atomic_write(path, advice) as file:
        file.write(data)


def write_json(path: Path, content: Any, indent: int | None = 2, advice: str = FREE_SPACE) -> None:
    """Replace `path` by `content` as json, as `atomic_write` does."""
    write_text(path, json.dumps(content, indent=indent) + "\n", advice=advice)


def open_growing(path: Path, append: bool = False, advice: str = FREE_SPACE) -> FileIO:
    """Open, without a buffer, a file that others read while it grows: a log, a lock, a part of `atomic_folder`.

    An existing one is replaced unless `append`. Raises UserError where it cannot be opened.
    """
    with explained(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(path, "a" if append else "w")


@contextmanager
def atomic_folder(path: Path, advice: str = FREE_SPACE) -> Iterator[Path]:
    """Yield a new folder that becomes `path` once it is filled; where another process was faster, its one stays.

    Raises UserError that ends with `advice` where it cannot be made or filled.
    """
    with explained(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            yield partial
            if not path.is_dir():
                partial.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def require_writable(option: str, folder: Path) -> None:
    """Make `folder` before the work whose results go there. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written: {error.strerror}. Give another folder.") from error
    require(os.access(folder, os.W_OK), f"{option} {folder} is read-only. Give another folder.")


def sweep_partial(folder: Path) -> None:
    """Remove what writes that were killed have left in `folder`."""
    for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):
        leftover.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(path: Path, advice: str = FREE_SPACE) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a UserError that names both and ends with `advice`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. {advice}") from error


def remove(path: Path) -> None:
    """Remove a file if it is there and can be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
