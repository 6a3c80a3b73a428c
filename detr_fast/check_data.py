"""`python -m detr_fast.check_data`: everything that is wrong with a data set, and whether a run will learn from it."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from rich.progress import track
from rich.table import Table

from detr_fast.command import run
from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.data.annotations import Category
from detr_fast.data.categories import by_spelling, spelling_hint
from detr_fast.data.checks import TRAINED_ON, beyond_coco, class_notes, trained_on, without_objects
from detr_fast.data.coco import CocoDataset, ImageRecord, size_mismatch, training_transform
from detr_fast.data.corrections import shortened
from detr_fast.data.duplicates import find_duplicates
from detr_fast.data.headers import UPRIGHT, Header, read_header
from detr_fast.data.splits import Location, find_split, require_split
from detr_fast.data.transforms import EvaluationTransform
from detr_fast.option_groups import Idle, Options
from detr_fast.options import (
    AugmentationOptions,
    DataOptions,
    LocationOptions,
    NetworkOptions,
    OptimizerOptions,
    Recipe,
    TrainOptions,
)
from detr_fast.training.advice import Length, judge
from detr_fast.training.batch_size import with_batches
from detr_fast.training.recipes import recipe_asked

NARROW_SPAN = 32
"""An eighth of 256 values."""
NAMED = 5
"""Images that a line names."""


@dataclass(frozen=True, kw_only=True)
class CheckDataOptions(Options):
    """Read every annotation and every image of a data set, list what is wrong, and say whether the training run of the
    same options will learn from it. Nothing is changed. Of `train`'s options those of data, model, length and
    augmentation are taken."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("images_per_second", lambda o: not o.optimizer.minutes, "without --minutes: give that too"),
    )
    recipe: Recipe = "paper"
    """The run's, as in `train`: defaults of the options below."""
    images_per_second: float = 0.0
    """Pace of training, as `train` shows it: with --minutes, the number of updates follows."""

    dataset: DataOptions = field(default_factory=DataOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)

    def __post_init__(self) -> None:
        pace = self.images_per_second
        require(0 <= pace < math.inf, f"--images-per-second must be at least 0, and finite, got {pace}.")
        self.training()

    def training(self) -> TrainOptions:
        """Return the run that is judged. Raises UserError for a number beyond its limits."""
        return TrainOptions(**{name: getattr(self, name) for name in OF_A_RUN})


OF_A_RUN = ("recipe", "dataset", "network", "optimizer", "augmentation")
"""Options that this command and `train` have in common."""


def default_options(argv: Sequence[str]) -> CheckDataOptions:
    """Return the recipe of the model and the data that are asked for."""
    recipe = recipe_asked(argv)
    return CheckDataOptions(**{name: getattr(recipe, name) for name in OF_A_RUN})


@dataclass
class Findings:
    """Lines, each with its split."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    """Faults: exit code 2"""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Things that may be meant, but are worth a look"""
    seen: dict[bytes, tuple[str, Path]] = field(default_factory=dict)
    """Hash of a file's content to the split and the path that had it first"""

    def add_once(self, split: str, problem: str) -> None:
        """Add a problem that several splits may have in common."""
        if all(problem != text for _, text in self.problems):
            self.problems.append((split, problem))


@dataclass(frozen=True)
class CheckedImage:
    """A record with the findings on its file."""

    record: ImageRecord
    problem: str | None
    header: Header | None
    digest: bytes | None
    """Hash of its content; None where it cannot be read."""
    span: int = 0
    """Its brightest value less its darkest, as it is read"""


def annotation_problems(dataset: CocoDataset, split: str, num_queries: int) -> Iterator[str]:
    """Yield a line for each fault of the annotations that training would not notice or could not use."""
    reason = without_objects(dataset.annotations)
    if reason and split == "train":
        yield f"there is nothing to train on: {reason}"
    yield from dataset.annotations.corrections.faults(ids_shown=20)
    yield from dataset.silent_faults()
    crowded = {record.path.name: len(record.labels) for record in dataset.records if len(record.labels) > num_queries}
    if crowded:
        yield (
            f"{len(crowded)} images have more than {num_queries} targets (up to {max(crowded.values())}; "
            f"{shortened(list(crowded), NAMED)}), but {num_queries} queries find no more of them. Raise --num-queries."
        )


def annotation_notes(dataset: CocoDataset, split: str) -> Iterator[str]:
    annotations = dataset.annotations
    reason, limit = without_objects(annotations), beyond_coco(annotations)
    if reason and split != "train":
        yield f"there is no object to find, so that no AP can be measured: {reason}"
    if limit:
        yield limit
    yield from find_duplicates(annotations).notes()
    yield from class_notes(annotations)
    small = annotations.corrections.below_pixel
    if small:
        yield f"{len(small)} boxes are less than a pixel wide or high (annotations {shortened(small, NAMED)})"


def check_image(record: ImageRecord) -> CheckedImage:
    header = read_header(record.path)
    try:
        image = record.decode().image
    except UserError as error:
        return CheckedImage(record, str(error), header, None)
    size = (image.shape[1], image.shape[2])
    problem = None if size == (record.height, record.width) else size_mismatch(record, size)
    span = int(image.max()) - int(image.min())
    return CheckedImage(record, problem, header, hashlib.sha256(record.path.read_bytes()).digest(), span)


def check_images(split: str, records: Sequence[ImageRecord], workers: int, console: Console) -> list[CheckedImage]:
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = pool.map(check_image, records)
        return list(track(checked, f"{split}: reading images", len(records), console=console, transient=True))


def image_problems(dataset: CocoDataset, images: Sequence[CheckedImage]) -> Iterator[str]:
    """Yield a line for each file that is wrong; one for all where none is there."""
    if all(record.absent for record in dataset.records):
        yield str(dataset.absent_images())
        return
    yield from (image.problem for image in images if image.problem)


def orientation_notes(images: Sequence[CheckedImage]) -> Iterator[str]:
    """Yield lines on images that EXIF has turned, where their size does not tell already."""
    turned = [one for one in images if one.header and one.header.orientation != UPRIGHT and not one.problem]
    texts = {
        False: "images have an EXIF orientation ({}), which is not applied: boxes must refer to the pixels as they are "
        "stored. If they were drawn on the image as other programs show it, write the files upright "
        "(ImageMagick: mogrify -auto-orient)",
        True: "TIFF images have an orientation ({}), which is applied: boxes must refer to the upright image",
    }
    for applied, text in texts.items():
        names = [
            f"{one.record.path.name}: {one.header.orientation}"
            for one in turned
            if one.header and one.header.applied == applied
        ]
        if names:
            yield f"{len(names)} " + text.format(shortened(names, NAMED))


def depth_notes(images: Sequence[CheckedImage]) -> Iterator[str]:
    """Yield a line on images of 12 bits in 16, or of 8 in 32: the upper bits, which are read, are nearly empty."""
    dark = [
        one.record.path.name
        for one in images
        if one.header and one.header.deep and one.digest and one.span < NARROW_SPAN
    ]
    if dark:
        yield (
            f"{len(dark)} images with 16 bits or more hold less than an eighth of the range "
            f"({shortened(dark, NAMED)}), of which the upper 8 of 16 bits are "
            "read: scale them to the whole range, or convert them to 8 bits"
        )


def content_notes(split: str, images: Sequence[CheckedImage], seen: dict[bytes, tuple[str, Path]]) -> Iterator[str]:
    """Yield lines on files with the content of another one, of this split or of one before; `seen` grows."""
    inside, across = [], []
    for image in images:
        if image.digest is None:
            continue
        first_split, first = seen.setdefault(image.digest, (split, image.record.path))
        pair = f"{image.record.path.name} is {first_split}'s {first.name}"
        if first_split != split:
            across.append(pair)
        elif first != image.record.path:
            inside.append(pair)
    if inside:
        yield f"{len(inside)} images have the content of another one ({shortened(inside, NAMED)}): keep one of each"
    if across:
        yield (f"{len(across)} images are another split's, too ({shortened(across, NAMED)}): {TRAINED_ON}")


def check_categories(ours: Sequence[Category], known: Sequence[Category]) -> Iterator[str]:
    """Yield categories that the first split does not have: a model trained on it cannot know them."""
    known_ones, spellings = set(known), by_spelling(known)
    for category in ours:
        if category not in known_ones:
            yield (
                f"category {category} is not among those of the training split.{spelling_hint([category], spellings)}"
            )


def summary(dataset: CocoDataset) -> str:
    targets = [len(record.labels) for record in dataset.records]
    counts = f"{len(targets)} images ({targets.count(0)} without targets), {sum(targets)} targets, "
    return counts + f"{int(dataset.annotations.crowd.sum())} crowds, {len(dataset.annotations.categories)} categories"


def respelled(dataset: CocoDataset) -> Iterator[str]:
    """Yield a line on file names that are not spelled as the files are, which are found all the same."""
    if names := list(dataset.respelled):
        kinds = "back-slashes, another Unicode form or percent signs"
        yield f"{len(names)} file names with {kinds}, such as {names[0]!r}: found all the same"


def locate(options: LocationOptions, split: str) -> Location | None:
    """Return where `split` lies; None where it need not be there. Raises UserError where training would miss it."""
    given_by_themselves = options.train_images or options.val_images
    return find_split(options, split) if split == "test" or given_by_themselves else require_split(options, split)


def check_split(
    split: str,
    dataset: CocoDataset,
    first: CocoDataset,
    options: CheckDataOptions,
    findings: Findings,
    console: Console,
) -> None:
    """Print a summary of a split, and add what is wrong with it, and with its classes beside those of the `first`."""
    num_queries = options.network.config().num_queries
    harmless = [*dataset.annotations.corrections.defaults(), *respelled(dataset)]
    console.print("\n  ".join([f"{split}: {summary(dataset)}", *harmless]))
    images = check_images(split, dataset.records, options.dataset.workers or os.cpu_count() or 1, console)
    problems = [
        *annotation_problems(dataset, split, num_queries),
        *image_problems(dataset, images),
        *check_categories(dataset.annotations.categories, first.annotations.categories),
    ]
    notes = [
        *annotation_notes(dataset, split),
        *orientation_notes(images),
        *depth_notes(images),
        *content_notes(split, images, findings.seen),
    ]
    findings.problems += [(split, line) for line in problems]
    findings.notes += [(split, line) for line in notes]


def main(options: CheckDataOptions) -> int:
    """Print what is wrong; return 0 if nothing is, else 2.

    A split that training needs and that is not there is a problem; of splits given one by one, one may be alone.
    """
    console = Console()
    findings = Findings()
    datasets: dict[Location, CocoDataset] = {}
    train_set: CocoDataset | None = None
    for split in ("train", "val", "test"):
        try:
            location = locate(options.dataset, split)
            if location is None:
                continue
            if location in datasets:
                same = datasets[location]
                findings.notes += [(split, str(trained_on(same, same)))] * (split == "val")
                continue
            dataset = datasets[location] = CocoDataset(
                *location, EvaluationTransform(size=1, max_size=1), follow_links=options.dataset.follow_links
            )
        except UserError as error:
            findings.add_once(split, str(error))
            continue
        check_split(split, dataset, next(iter(datasets.values())), options, findings, console)
        if split == "train":
            train_set = dataset
    if train_set:
        print_outlook(options, train_set, findings, console)
    print_lines("to look at, though it may be meant", findings.notes, console)
    print_lines("problems", findings.problems, console)
    if not findings.problems:
        console.print("Nothing is wrong with the data.")
    return 2 if findings.problems else 0


def print_outlook(options: CheckDataOptions, train_set: CocoDataset, findings: Findings, console: Console) -> None:
    """Print a table that says whether `train` with the same options will learn; add a problem where it refuses them."""
    asked, images = options.training(), len(train_set)
    try:
        config = asked.network.config(**asked.dataset.sizes_given())
        train_set.transform = training_transform(asked.augmentation, config.max_size)
        asked = with_batches(asked, config, "cpu", 1, images)
        length = Length.of(asked.optimizer, images, processes=1, images_per_second=options.images_per_second)
        rows = judge(asked, config, train_set, length)
    except UserError as error:
        findings.add_once("train", str(error))
        return
    headings = ("will it train?", "here", "verdict", "what to change")
    table = Table(*headings, title=asked.network.model, title_justify="left")
    for row in rows:
        table.add_row(row.what, row.here, row.verdict, row.change, style=STYLES.get(row.verdict))
    console.print(table)


STYLES = {"doubtful": "yellow", "will not do": "red"}


def print_lines(title: str, lines: Sequence[tuple[str, str]], console: Console) -> None:
    """Print one line for each, however long, so that a search finds its words together."""
    if lines:
        console.print(f"{title}: {len(lines)}")
    for split, line in lines:
        console.print(f"  {split:<5}  {line}")


if __name__ == "__main__":
    run(main, CheckDataOptions, default_options)
