"""Checks of paths that a user gave, and the cache folder."""

import os
import stat
import tempfile
from pathlib import Path
from typing import Literal

from detr_fast.config import UserError, require

Kind = Literal["nothing", "file", "folder", "broken link", "special file"]


def kind_of(path: str | Path) -> Kind:
    """Return what is at `path`, links followed. Raises UserError where the system does not allow to look."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "broken link" if os.path.islink(path) else "nothing"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path!s:.200}: cannot be looked at: {reason}.") from error
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "special file"


def require_kind(kind: Kind, path: Path, given: str, advice: str = "") -> None:
    """Raise UserError, which begins with `given` and ends with `advice`, where `path` is no `kind`."""
    found = kind_of(path)
    wrong = f"there is no such {kind}" if found == "nothing" else f"it is a {found}, not a {kind}"
    require(found == kind, f"{given}: {wrong}.{f' {advice}' * bool(advice)}")


def cache_folder() -> Path:
    """Find the folder of generated data: DETR_FAST_CACHE, else the user's cache; without a home, a temporary folder."""
    if named := os.environ.get("DETR_FAST_CACHE"):
        return Path(named)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "detr_fast"
    try:
        return Path.home() / ".cache" / "detr_fast"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "detr_fast"
