"""predictions.json, which at any time of a run holds what was found so far."""

import errno
import json
import os
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from detr_fast.files import explained, open_growing, write_json

CLOSING = b"\n]\n"


class PredictionsFile:
    """A context manager. The file is valid json after every `add`; `finish` puts it in the order of file names.

    All raise UserError where it cannot be written; what was added before is then still in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        self._end = 0
        """Where the closing bracket begins."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, entries: Sequence[dict[str, Any]]) -> None:
        """Write entries of at least one image over the closing bracket, and the bracket again, in one write."""
        texts = [textwrap.indent(json.dumps(one, indent=2), "  ") for one in entries]
        text = (",\n" if self.entries else "[\n") + ",\n".join(texts)
        if self._file is None:
            self._file = open_growing(self.path)
        with explained(self.path):
            self._write(self._file, text.encode("ascii"))
        self.entries += entries

    def _write(self, file: FileIO, text: bytes) -> None:
        file.seek(self._end)
        written = file.write(text + CLOSING)
        if written == len(text + CLOSING):
            self._end += len(text)
            return
        with suppress(OSError):  # the disk is full: close what was there before
            file.seek(self._end)
            file.write(CLOSING)
            file.truncate()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self) -> None:
        """Put the file in the order of file names, in one step."""
        self.entries.sort(key=lambda one: one["file_name"])
        write_json(self.path, self.entries)
