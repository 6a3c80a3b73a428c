"""Lookup of a json's `file_name`, however it is spelled; never a file outside the images' folder."""

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
    """The path of an image, whether or not there is a file."""

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
        for spelling in filter(is_file_name, self._spellings(file_name)):
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

    def _spellings(self, name: str) -> Iterator[str]:
        """Yield other spellings of `name`, each of which costs a call of the file system; last that of a listed file.

        The last is yielded where just one file of the folder has the name in a mixture of the spellings.
        """
        yield from spellings(name)
        alike = [path for path in self._listed.get(same_spelling(name), ()) if plain(path) == plain(name)]
        if len(alike) == 1:
            yield alike[0]

    @cached_property
    def _files(self) -> list[str]:
        """List every file of the folder, by its path in it, the shallowest first."""
        walked = ((os.path.relpath(folder, self.root), files) for folder, _, files in os.walk(self.root))
        paths = [os.path.normpath(os.path.join(folder, file)) for folder, files in walked for file in files]
        return sorted(paths, key=lambda path: (path.count("/"), path))

    @cached_property
    def _listed(self) -> dict[str, list[str]]:
        """Map the files by their path in any spelling, and by what is left of it without the first folders."""
        listed: dict[str, list[str]] = {}
        for path in self._files:
            for end in ends_of(same_spelling(path)):
                listed.setdefault(end, []).append(path)
        return listed

    @cached_property
    def _listed_without_ending(self) -> dict[str, list[str]]:
        listed: dict[str, list[str]] = {}
        for end, paths in self._listed.items():
            listed.setdefault(os.path.splitext(end)[0], []).extend(paths)
        return listed

    def _nearest(self, name: str) -> str:
        """Say which file there is whose name is like `name`, and how the two differ; else what is there at all."""
        wanted, folder = same_spelling(name), os.path.basename(self.root)
        alike = next((self._listed[end] for end in ends_of(wanted) if end in self._listed), None)
        if alike is None:
            ends = ends_of(os.path.splitext(wanted)[0])
            alike = next((paths for end in ends if (paths := self._listed_without_ending.get(end))), None)
        if alike is None:
            some = f", such as {self._files[0]!r}" if self._files else ""
            return f": the folder has {len(self._files)} files{some}, and none like it"
        found = same_spelling(alike[0])
        if found == wanted:
            how = "other upper and lower case, percent signs, or another Unicode form"
        elif wanted == same_spelling(f"{folder}/{alike[0]}"):
            how = f"without the images' folder {folder}/ itself"
        elif os.path.basename(found) == os.path.basename(wanted):
            how = f"in another folder{f', as {len(alike) - 1} others of this name are' if len(alike) > 1 else ''}"
        else:
            how = "with another ending"
        return f": there is {alike[0]!r} ({how}); correct 'file_name', or move the file"


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
    """Yield other spellings: slashes for back-slashes (Windows), both Unicode normal forms (macOS), percent-decoded."""
    for text in dict.fromkeys((name, without_percent(name))):
        slashed = text.replace("\\", "/")
        yield from dict.fromkeys((slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))))


def without_percent(name: str) -> str:
    """Decode percent signs (Label Studio); bytes that are no UTF-8 become what `os.fsdecode` makes of them."""
    return unquote(name, errors="surrogateescape")


def plain(name: str) -> str:
    """Return `name` in a form that all its spellings have."""
    return os.path.normpath(unicodedata.normalize("NFC", without_percent(name).replace("\\", "/")))


def same_spelling(name: str) -> str:
    """Return `plain(name)` without upper and lower case."""
    return plain(name).casefold()


def ends_of(path: str) -> Iterator[str]:
    """Yield `path`, and what is left of it without the first folder, the first two, and so on."""
    parts = path.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))
