"""Our own files of weights: written whole or not at all, and read only if every byte is as it was written.

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
from detr_fast.files import FREE_SPACE, atomic_write
from detr_fast.paths import kind_of
from detr_fast.weights.pickles import read_pickle

MARK = b"detr_fast sha256:"
END_RECORD = b"PK\x05\x06"


def write_container(path: Path, content: dict[str, Any], advice: str = FREE_SPACE) -> None:
    """Replace `path` by tensors and plain values in one step, as `atomic_write` does. Raises UserError likewise."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getbuffer()[:-2]  # the archive's last two bytes give the length of its comment: none yet
    comment = MARK + hashlib.sha256(body).hexdigest().encode()
    with atomic_write(path, advice) as file:
        file.write(body)
        file.write(struct.pack("<H", len(comment)) + comment)


def read_container(path: Path) -> dict[str, Any]:
    """Read what `write_container` wrote. Raises UserError where the file is missing, cut, changed or another's."""
    require(kind_of(path) != "special file", f"Cannot read checkpoint {path}: it is no regular file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read checkpoint {path}: {error.strerror}.{other_checkpoint(path)}") from error
    found = stored_digest(data)
    if found is None:
        raise UserError(
            f"{path} is not a whole checkpoint of detr_fast: it is empty, cut off or of another kind."
            f"{other_checkpoint(path)}"
        )
    end, digest = found
    if hashlib.sha256(memoryview(data)[:end]).hexdigest() != digest:
        raise UserError(f"{path} is damaged: its content does not match its sha256.{other_checkpoint(path)}")
    return read_pickle(path, data)


def is_container(path: Path) -> bool:
    """Tell whether the file ends as one that `write_container` wrote."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 256))
        return stored_digest(file.read()) is not None


def stored_digest(data: memoryview | bytes) -> tuple[int, str] | None:
    """Find the offset of the archive's comment length, and the digest in the comment; None where there is none."""
    tail = bytes(data[-(22 + len(MARK) + 64) :])
    if not tail.startswith(END_RECORD) or MARK not in tail:
        return None
    return len(data) - len(MARK) - 64 - 2, tail[-64:].decode("ascii", "replace")


def other_checkpoint(path: Path) -> str:
    """Hint at the other checkpoint beside `path`, where there is one."""
    others = sorted(other for other in path.parent.glob("*.pt") if other != path)
    start = "leave --resume out, and give --weights FILE and another --output"
    return f" Beside it is {others[0]}, to start a new run from: {start}." if others else ""
