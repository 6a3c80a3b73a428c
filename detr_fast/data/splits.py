"""Lookup of a data set's splits: the embedded one, folders given one by one, or a root in a known layout."""

import warnings
from pathlib import Path
from typing import Literal

from detr_fast.config import DataLocation, UserError, require
from detr_fast.data.corrections import shortened
from detr_fast.data.shapes import ensure_shapes, is_shapes, parse_shapes
from detr_fast.paths import kind_of, require_kind

Split = Literal["train", "val", "test"]
Location = tuple[Path, Path]
"""The images' folder and the annotation file."""


def find_split(options: DataLocation, split: str) -> Location | None:
    """Find where `split` lies; None where the data set has no such split. Without val, test stands in, with a warning.

    Raises UserError where a root, or one half of a split, is missing.
    """
    require(split in ("train", "val", "test"), f"split {split!r}: give train, val or test.")
    explicit = explicit_location(options, split)
    if explicit is not None:
        return explicit
    if is_shapes(options.data):
        given_otherwise = options.train_images is not None or options.val_images is not None
        return None if given_otherwise or split == "test" else shapes_location(options.data, split)
    root = Path(options.data)
    require_kind("folder", root, f"--data {root}", "Give one in COCO layout, or shapes:SIDE.")
    found = first_present(root, split)
    if found is None and split == "val":
        found = first_present(root, "test")
        if found is not None:
            warnings.warn(f"{root} has no val split: its test split is used for validation.")
    return found


def require_split(options: DataLocation, split: str) -> Location:
    """Find `split` as `find_split` does. Raises UserError that lists what was looked for where there is none."""
    found = find_split(options, split)
    if found is not None:
        return found
    give = f"give --{split}-images and --{split}-annotations" if split != "test" else "give a folder that has one"
    if is_shapes(options.data):
        raise UserError(f"No {split} split: {give}.")
    root = Path(options.data)
    looked_for = "; ".join(f"{file} beside {images}/" for images, file in candidates(root, split))
    raise UserError(
        f"No {split} split. Looked for {looked_for}. {listed(root / 'annotations')}"
        f"Lay the data out like one of these, or {give}."
    )


def listed(folder: Path) -> str:
    """Write a sentence on the json files of `folder`; none where there are none."""
    names = sorted(path.name for path in folder.glob("*.json")) if kind_of(folder) == "folder" else []
    return f"{folder} has {shortened(names, 5)}. " if names else ""


def explicit_location(options: DataLocation, split: str) -> Location | None:
    given = {
        "train": (options.train_images, options.train_annotations),
        "val": (options.val_images, options.val_annotations),
    }
    images, file = given.get(split, (None, None))
    if images is None or file is None:
        return None
    require_kind("folder", Path(images), f"--{split}-images {images}")
    require_kind("file", Path(file), f"--{split}-annotations {file}")
    return Path(images), Path(file)


def shapes_location(data: str, split: str) -> Location:
    root = ensure_shapes(parse_shapes(data))
    return root / split, root / "annotations" / f"{split}.json"


def candidates(root: Path, split: str) -> list[Location]:
    annotations = root / "annotations"
    return [
        (root / split, annotations / f"{split}.json"),
        (root / f"{split}2017", annotations / f"instances_{split}2017.json"),
    ]


def first_present(root: Path, split: str) -> Location | None:
    for images, file in candidates(root, split):
        if kind_of(file) != "nothing":
            require_kind("file", file, str(file))
            require_kind("folder", images, f"{file} is there, but not the folder of its images, {images}")
            return images, file
    return None
