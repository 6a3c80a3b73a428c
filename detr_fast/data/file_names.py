"""Which file a json's `file_name` means, however it is spelled; never one outside the images' folder."""

import errno
import ntpath
import os
import stat
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

UNKNOWN = 0
"""The mode of a file that may not even be looked at."""


class OutsideError(Exception):
    """Raised for a name that is not followed; says why, and what to do."""


class Found(NamedTuple):
    """Where an image lies."""

    path: Path
    absent: str = ""
    """Why there is no such file, and what to do; empty where there is one."""


class ImageFolder:
    """Finds images by the names that a json gives them.

    A name that leads to another folder is refused, and so is a symbolic link out of this one, but for `follow_links`:
    then a link that lies inside may lead anywhere. The folder itself may be a link.
    """

    def __init__(self, folder: Path, follow_links: bool = False) -> None:
        self.root = os.path.realpath(folder)
        self.follow_links = follow_links
        self.respelled: dict[str, str] = {}
        """Names of the json to those of the files found for them, where the two differ."""
        self._safe_parents = {self.root}

    def find(self, file_name: str) -> Found:
        """Return where `file_name` lies, or why there is no such file; usually one call of the file system.

        Raises OutsideError for a name that is not followed.
        """
        path = self._within(file_name)
        if (mode := mode_of(path)) is not None:
            return self._followed(path, mode)
        for spelling in spellings(file_name):
            other = self._within(spelling)
            if ntpath.isabs(spelling):
                raise self._outside(file_name)
            if (mode := mode_of(other)) is not None:
                self.respelled[file_name] = os.path.relpath(other, self.root)
                return self._followed(other, mode)
        return Found(Path(path), f"the image file is missing{self._nearest(file_name)}.")

    def _within(self, name: str) -> str:
        """Return the path of `name`, which no `..` leads out of the folder. Raises OutsideError."""
        if not is_file_name(name):
            raise OutsideError("is no file name.")
        path = os.path.normpath(os.path.join(self.root, name))
        if not self._is_inside(path):
            path = os.path.realpath(path)  # may be the folder itself, by the name of a link to it
        if not self._is_inside(path):
            raise self._outside(name)
        return path

    def _outside(self, name: str) -> OutsideError:
        advice = "Put the image inside it and name it from there"
        return OutsideError(f"leads out of the folder {self.root}. {advice}{self._nearest(name)}.")

    def _is_inside(self, path: str) -> bool:
        return path.startswith(os.path.join(self.root, ""))

    def _followed(self, path: str, mode: int) -> Found:
        """Return the file at `path`, of which `mode` is known, with what is wrong with the links on the way to it.

        Raises OutsideError for one that leads out.
        """
        parent = os.path.dirname(path)
        if mode == UNKNOWN or (not stat.S_ISLNK(mode) and parent in self._safe_parents):
            return Found(Path(path))
        target = os.path.realpath(path)
        if problem := why_not_opened(path):
            return Found(Path(path), f"the image file is a symbolic link to {target}, {problem}.")
        if not self._is_inside(target) and not self.follow_links:
            link = next(part for part in (*reversed(Path(path).parents), Path(path)) if part.is_symlink())
            raise OutsideError(
                f"leads out of the folder {self.root}: {link} is a symbolic link, and the file is {target}. Give "
                "--follow-links if you trust the data set, or put the file itself there (cp -rL copies what links "
                "lead to)."
            )
        if not stat.S_ISLNK(mode):
            self._safe_parents.add(parent)
        return Found(Path(path))

    @cached_property
    def _listed(self) -> dict[str, list[str]]:
        """Every file of the folder, by its name without the ending, in any spelling."""
        listed: dict[str, list[str]] = {}
        for folder, _, files in os.walk(self.root):
            for file in files:
                path = os.path.relpath(os.path.join(folder, file), self.root)
                listed.setdefault(stem_of(path), []).append(path)
        return listed

    @cached_property
    def _in_all(self) -> str:
        some = next((f", such as {paths[0]!r}" for paths in self._listed.values()), "")
        return f": the folder has {sum(map(len, self._listed.values()))} files{some}, and none like it"

    def _nearest(self, name: str) -> str:
        """Say which file there is whose name is like `name`, and how the two differ; else what is there at all."""
        wanted = same_spelling(name)
        alike = self._listed.get(stem_of(name))
        if not alike:
            return self._in_all

        def agrees(path: str) -> tuple[bool, bool, int]:
            found = same_spelling(path)
            return found == wanted, os.path.basename(found) == os.path.basename(wanted), -len(path)

        nearest = max(alike, key=agrees)
        same, same_file, _ = agrees(nearest)
        folder = os.path.basename(self.root)
        if same:
            how = "other upper and lower case, or another Unicode form"
        elif same_file and wanted == same_spelling(f"{folder}/{nearest}"):
            how = f"without the images' folder {folder}/ itself"
        else:
            how = "in another folder" if same_file else "with another ending"
        return f": there is {nearest!r} ({how}); correct 'file_name', or move the file"


def is_file_name(text: str) -> bool:
    """Tell whether a file could have this name at all: no NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def mode_of(path: str) -> int | None:
    """Return a file's mode, a link's own; UNKNOWN where that cannot be told; None where there is no file."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # nor can it be opened, and whoever tries says why
        return UNKNOWN


def why_not_opened(path: str) -> str | None:
    """Say why what links lead to is not there, and what to do; None where it is."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "which is not there: fetch the data (dvc pull, git annex get), or put the images themselves there"
    except OSError as error:
        reason = "which leads back to itself" if error.errno == errno.ELOOP else f"which says {error.strerror}"
        return f"{reason}: put the image itself there"
    return None


def spellings(name: str) -> Iterator[str]:
    """Yield what may be meant: slashes for back-slashes (Windows), the composed and the decomposed form of Unicode
    (macOS), and each without percent signs (Label Studio)."""
    for text in dict.fromkeys((name, unquote(name))):
        slashed = text.replace("\\", "/")
        yield from dict.fromkeys((slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))))


def same_spelling(name: str) -> str:
    """Return `name` in a form that all its spellings have, upper and lower case too."""
    return os.path.normpath(unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold())


def stem_of(name: str) -> str:
    return os.path.splitext(os.path.basename(same_spelling(name)))[0]
