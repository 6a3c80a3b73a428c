"""Checkpoints: written whole or not at all, and read only if every byte is what was written.

A file is torch's own format; its sha256 stands in the archive's comment, so `torch.load` reads it too.
"""

import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import torch

from detr_fast.config import UserError, require
from detr_fast.paths import kind_of
from detr_fast.weights.pickles import read_pickle

MARK = b"detr_fast sha256:"
PARTIAL_SUFFIX = ".partial"
END_RECORD = b"PK\x05\x06"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces `path` by `state` in one step: a kill at any moment leaves the old file or the new one, never a torn
    one.

    Raises UserError where it cannot be written; the old file is then still there and the partial one is gone.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getbuffer()[:-2]  # the archive's last two bytes give the length of its comment: none yet
    comment = MARK + hashlib.sha256(body).hexdigest().encode()
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            file.write(body)
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"Could not write {path}: {error.strerror}. Free some space or give another --output; "
            "the previous checkpoint is kept and --resume auto continues from it."
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_partial(folder: Path) -> None:
    """Removes what an interrupted save left behind."""
    for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):
        leftover.unlink()


def stored_digest(data: memoryview | bytes) -> tuple[int, str] | None:
    """Find where the archive's comment length stands, and the digest in the comment; None where there is no such
    comment."""
    tail = bytes(data[-(22 + len(MARK) + 64) :])
    if not tail.startswith(END_RECORD) or MARK not in tail:
        return None
    return len(data) - len(MARK) - 64 - 2, tail[-64:].decode("ascii", "replace")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote. Raises UserError where the file is missing, cut, changed, or no checkpoint
    of ours."""
    require(kind_of(path) != "special file", f"Cannot read checkpoint {path}: it is no regular file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read checkpoint {path}: {error.strerror}.{previous(path)}") from error
    found = stored_digest(data)
    if found is None:
        raise UserError(
            f"{path} is not a whole checkpoint of detr_fast: it is empty, cut off or of another kind.{previous(path)}"
        )
    end, digest = found
    if hashlib.sha256(memoryview(data)[:end]).hexdigest() != digest:
        raise UserError(f"{path} is damaged: its content does not match its sha256.{previous(path)}")
    return read_pickle(path, data)


def is_checkpoint(path: Path) -> bool:
    """Whether the file ends as one that `save_checkpoint` wrote."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 256))
        return stored_digest(file.read()) is not None


def previous(path: Path) -> str:
    """Hint at the other checkpoint beside `path`, where there is one."""
    others = sorted(other for other in path.parent.glob("*.pt") if other != path)
    start = "leave --resume out, and give --weights FILE and another --output"
    return f" Beside it is {others[0]}, to start a new run from: {start}." if others else ""
