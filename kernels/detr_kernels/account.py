"""Preparation of the environment for a user whom the machine does not know, or who may not write to torch's cache.

`docker run --user 12345` is such a user: torch names its cache after the user, and makes it when it is imported.
"""

import getpass
import os
import sys
import tempfile
import warnings
from pathlib import Path

CACHE = "TORCHINDUCTOR_CACHE_DIR"
CACHES = {"XDG_CACHE_HOME": "", "MPLCONFIGDIR": "/matplotlib", "TRITON_HOME": "/triton"}
"""Variables that lead what torch, matplotlib and Triton keep to another folder than the user's home."""


def prepare_account() -> None:
    """Set environment variables that torch, matplotlib and Triton read, where their defaults would fail.

    LOGNAME becomes the user's number where neither the environment nor the machine knows a name; cache folders become
    temporary ones where there is no writable home; torch's own becomes a new one where the usual one cannot be written.
    Exits where there is no folder for temporary files, without which torch's compiler cannot be imported.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # the second from Python 3.13 on
        name = os.environ["LOGNAME"] = str(os.getuid())
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        print(f"error: {error.strerror}. Set TMPDIR to a folder that can be written.", file=sys.stderr)
        sys.exit(2)
    home = os.path.expanduser("~")  # without one "~" itself, of which torch would make a folder for what it downloads
    if home == "~" or not can_be_written(Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"))):
        for variable, place in CACHES.items():
            os.environ.setdefault(variable, f"{temporary}/cache_{name}{place}")
    folder = Path(os.environ.get(CACHE) or Path(temporary, f"torchinductor_{name}"))
    if not can_be_written(folder):
        os.environ[CACHE] = tempfile.mkdtemp(prefix="torchinductor_")
        warnings.warn(f"{folder} cannot be written: compiled code is kept in {os.environ[CACHE]} ({CACHE}).")


def can_be_written(folder: Path) -> bool:
    """Tell whether `folder` can be written; makes it where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


prepare_account()
