"""Images in a folder of photographs, and why other files in it are passed over."""

from pathlib import Path

from detr_fast.config import UserError, require
from detr_fast.data.corrections import shortened
from detr_fast.data.decode import JPEG_START
from detr_fast.data.formats import START_BYTES, described
from detr_fast.data.headers import read_header
from detr_fast.paths import kind_of

IMAGE_ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo", ".png", ".gif", ".bmp"),
    *(".webp", ".tif", ".tiff", ".ppm", ".avif"),
}
"""Whatever ends so, in capitals too, is meant as an image: where it is none, that is an error. Of all else
the content decides."""
NAMED_AT_MOST = 5


def find_images(path: Path) -> tuple[list[Path], list[str]]:
    """Return the file, or a folder's images by name without subfolders, and a line for each reason to pass files over.

    Raises UserError if there is no image.
    """
    kind = kind_of(path)
    if kind != "folder":
        require(kind != "nothing", f"{path}: there is no such file or folder.")
        require(kind != "broken link", f"{path} is a broken link.")
        return [path], []
    files: list[Path] = []
    passed_over: dict[str, list[str]] = {}
    try:
        found = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be read: {error.strerror}.") from error
    for file in found:
        reason = why_passed_over(file)
        if reason is None:
            files.append(file)
        else:
            passed_over.setdefault(reason, []).append(file.name)
    lines = [
        f"{f'{len(names)} files: ' * (len(names) > 1)}{shortened(names, NAMED_AT_MOST)} ({reason})"
        for reason, names in passed_over.items()
    ]
    require(len(files) > 0, "\n  ".join((f"{path}: no images in this folder.", *lines)))
    return files, lines


def why_passed_over(file: Path) -> str | None:
    """Say why `file`, in a folder of images, is not to be read; None for an image, whole or broken."""
    kind = kind_of(file)
    if kind == "folder":
        return "folders are not entered"
    if file.name.startswith("._"):
        return "a note of macOS on another file"
    if kind == "special file":
        return "no regular file"
    if file.suffix.lower() in IMAGE_ENDINGS:
        return None
    if kind != "file":
        return "no file that can be read"
    try:
        with file.open("rb") as opened:
            start = opened.read(START_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if start.startswith(JPEG_START) or read_header(file):
        return None
    return described(start) or "not an image of a known format"
