"""Corrections that reading a COCO json had to make, and doubts about what cannot be mended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Corrections:
    """Corrections made while reading; annotations by the ids that the file gives them."""

    dropped_empty: tuple[Any, ...]
    """No area, or none inside the image."""
    dropped_unlisted: tuple[Any, ...]
    """Their images are not listed."""
    clamped: tuple[Any, ...]
    """Reached past the image's edge."""
    defaulted_crowd: int
    """Annotations without `iscrowd`, taken as 0."""
    defaulted_area: int
    """Annotations without `area`, taken as width times height."""
    renumbered: bool
    """Annotation ids were missing, double or below 1, and are now 1, 2, ..."""
    corrected_area: tuple[Any, ...] = ()
    """An `area` of 0 or less, relative, or larger than the image: taken as width times height."""
    likely_formats: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Other formats that boxes seem to have instead of COCO's, and which boxes: nothing is mended."""
    below_pixel: tuple[Any, ...] = ()
    """Less than a pixel wide or high, and not for their format."""
    unnamed: int = 0
    """Categories without a name, called by their ids."""

    def faults(self, ids_shown: int = 5) -> list[str]:
        """Say what is wrong with the data, a line for each kind, with the first annotations' ids."""
        kinds = {
            "boxes have no area inside their image: dropped": self.dropped_empty,
            "annotations are of images that are not listed: dropped": self.dropped_unlisted,
            "boxes pass their image's edge: clamped for training": self.clamped,
            "areas are 0, negative, relative or larger than their image: taken as width times height": (
                self.corrected_area
            ),
        }
        return [f"{len(ids)} {text} (annotations {shortened(ids, ids_shown)})" for text, ids in kinds.items() if ids]

    def doubtful_formats(self) -> list[str]:
        """Say what boxes seem to be instead of COCO's, a line for each kind: nothing good can be learned from them."""
        return [
            f"{len(ids)} boxes look like {words}, but COCO's are x, y, width, height in pixels: check a few, and "
            f"rewrite the file (annotations {shortened(ids, 5)})"
            for words, ids in self.likely_formats
        ]

    def defaults(self) -> list[str]:
        """Say what the file leaves out and is filled in without harm, a line for each kind."""
        kinds = {
            "annotations without iscrowd: taken as 0": self.defaulted_crowd,
            "annotations without area: taken as width times height": self.defaulted_area,
            "categories without a name: called by their ids": self.unnamed,
        }
        lines = [f"{count} {text}" for text, count in kinds.items() if count]
        if self.renumbered:
            lines.append("annotation ids missing, double or below 1: renumbered")
        return lines

    def lines(self) -> list[str]:
        """List faults and defaults; nothing if the file was clean."""
        return self.faults() + self.defaults()


def shortened(items: Sequence[Any], shown: int) -> str:
    """Name the first `shown` items, and say how many more there are."""
    text = ", ".join(map(str, items[:shown]))
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"
