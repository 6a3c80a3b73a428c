"""`python -m detr_fast.check_data`: everything that is wrong with a data set, in one list, before training starts."""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich.progress import track
from rich.table import Table

from detr_fast.command import run
from detr_fast.config import DataLocation, UserError
from detr_fast.console import Console
from detr_fast.data.annotations import Category
from detr_fast.data.coco import SKIPPING, CocoDataset, ImageRecord, size_mismatch
from detr_fast.data.splits import Location, find_split, require_split
from detr_fast.data.transforms import EvaluationTransform


@dataclass(frozen=True, kw_only=True)
class CheckDataConfig(DataLocation):
    """Read every annotation and every image of a data set and list what is wrong. Nothing is changed."""

    num_queries: int = 100
    """How many objects an image may have at most: the model's queries."""


def check_annotations(dataset: CocoDataset, num_queries: int) -> Iterator[str]:
    """What reading the json had to mend, and images with more objects than a model can find."""
    yield from dataset.annotations.corrections.faults(ids_shown=sys.maxsize)
    for record in dataset.images_with_more_targets(num_queries):
        yield f"{record.path}: {len(record.labels)} targets, but {num_queries} queries. Raise --num-queries."


def check_image(record: ImageRecord) -> str | None:
    """What is wrong with the image's file, if anything."""
    try:
        image = record.decode().image
    except UserError as error:
        return f"{error} {SKIPPING}"
    size = (image.shape[1], image.shape[2])
    return None if size == (record.height, record.width) else f"{size_mismatch(record, size)} {SKIPPING}"


def check_categories(ours: Sequence[Category], known: Sequence[Category]) -> Iterator[str]:
    """Categories that the first split does not have: a model trained on it cannot know them."""
    for category in ours:
        if category not in known:
            yield f"category {category.id} {category.name!r} is not among those of the training split"


def check_images(split: str, dataset: CocoDataset, workers: int, console: Console) -> list[str]:
    records = dataset.records
    if all(record.absent for record in records):
        return [str(dataset.absent_images())]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        problems = pool.map(check_image, records)
        shown = track(problems, f"{split}: reading images", len(records), console=console, transient=True)
        return [problem for problem in shown if problem]


def summary(dataset: CocoDataset) -> str:
    targets = [len(record.labels) for record in dataset.records]
    counts = f"{len(targets)} images ({targets.count(0)} without targets), {sum(targets)} targets, "
    return counts + f"{int(dataset.annotations.crowd.sum())} crowds, {len(dataset.annotations.categories)} categories"


def respelled(dataset: CocoDataset) -> Iterator[str]:
    """File names that are not spelled as the files are, which are found all the same."""
    if names := list(dataset.respelled):
        kinds = "back-slashes, another Unicode form or percent signs"
        yield f"{len(names)} file names with {kinds}, such as {names[0]!r}: found all the same"


def check_split(split: str, dataset: CocoDataset, options: CheckDataConfig, console: Console) -> list[str]:
    """What is wrong with it, one line a problem; what it holds is printed."""
    harmless = [*dataset.annotations.corrections.defaults(), *respelled(dataset)]
    console.print("\n  ".join([f"{split}: {summary(dataset)}", *harmless]), markup=False)
    return [
        *check_annotations(dataset, options.num_queries),
        *check_images(split, dataset, options.workers or os.cpu_count() or 1, console),
    ]


def main(options: CheckDataConfig) -> int:
    """Prints what is wrong; returns 0 if nothing is, else 2. Raises UserError where there is no data set at all."""
    console = Console()
    problems: dict[str, str] = {}  # each with its split, named once though all splits may share it
    datasets: dict[Location, CocoDataset] = {}
    for split in ("train", "val", "test"):
        try:
            location = find_split(options, split)
            if location is None or location in datasets:
                continue
            dataset = datasets[location] = CocoDataset(
                *location, EvaluationTransform(size=1, max_size=1), follow_links=options.follow_links
            )
        except UserError as error:
            problems.setdefault(str(error), split)
            continue
        first = next(iter(datasets.values()))
        found = check_split(split, dataset, options, console)
        found += check_categories(dataset.annotations.categories, first.annotations.categories)
        problems.update(dict.fromkeys(found, split))
    if not datasets and not problems:
        require_split(options, "train")
    print_problems(problems, console)
    return 2 if problems else 0


def print_problems(problems: dict[str, str], console: Console) -> None:
    table = Table("split", "what is wrong", title=f"problems: {len(problems)}")
    for problem, split in problems.items():
        table.add_row(split, problem)
    console.print(table if problems else "Nothing is wrong.")


if __name__ == "__main__":
    run(main, CheckDataConfig)
