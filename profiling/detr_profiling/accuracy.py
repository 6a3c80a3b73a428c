"""`python -m detr_profiling accuracy`: accuracy against seconds of training, configuration beside configuration.

Each run is `train` itself, or torchvision's Faster R-CNN, in a process of its own and as long as the others: seed after
seed, configurations in turns. A run is judged at its own evaluations, whose time is not counted. Configurations are
chosen on a part of the training images, which is set apart, so that the test images are looked at once.
"""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from detr_fast.config import require
from detr_fast.console import Console
from detr_fast.data.shapes import is_shapes
from detr_fast.data.splits import find_split, require_split
from detr_fast.files import open_growing, write_json
from detr_fast.option_groups import Idle, Options, flags
from detr_fast.options import LocationOptions, Output
from detr_fast.training.metrics_log import read_rows
from detr_profiling.measuring.machine import describe_machine
from detr_profiling.measuring.stopping import stop
from detr_profiling.pages.accuracy import AccuracyRun, accuracy_sections
from detr_profiling.pages.report import HTML_FILE, write_report
from detr_profiling.pages.results import ACCURACY_FILE, read_object
from detr_profiling.pages.terminal import show

REFEREE = "fasterrcnn"
MODULES = {REFEREE: "detr_profiling.baselines.faster_rcnn_training"}
START_MINUTES = 5
"""A run may take that much longer than its minutes and as long again for its evaluations, before it is stopped."""


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(Options):
    """Train configurations beside each other, and show what accuracy each has after how many seconds."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(
            "val_fraction",
            lambda o: is_shapes(o.data),
            "on the embedded data set, which has validation images: give a folder as --data",
        ),
    )
    data: str = "shapes:128"
    """A folder in COCO layout, or shapes:SIDE, the embedded data set."""
    configurations: tuple[str, ...] = ("detr_lite", REFEREE)
    """Each a model and options of train, as in 'detr_lite --lr 1e-3'; fasterrcnn is torchvision's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 10
    """Length of each run, evaluations apart."""
    val_fraction: float = 0.2
    """Fraction of the training images that is set apart to judge by; 0: judge by the data's own validation or test
    images, when nothing is chosen any more."""
    output: Output = "runs/accuracy"
    """Folder for accuracy.json and the runs; runs that are in it are not made again."""

    def __post_init__(self) -> None:
        require(self.minutes > 0, f"--minutes must be positive, got {self.minutes}.")
        require(0 <= self.val_fraction < 1, f"--val-fraction must be in [0, 1), got {self.val_fraction}.")
        require(len(self.configurations) > 0 and len(self.seeds) > 0, "Give at least one configuration and one seed.")


def set_apart(options: AccuracyOptions) -> LocationOptions:
    """Return where runs train and are judged: the data's own splits, or a part of its training images set apart."""
    place = LocationOptions(data=options.data)
    if is_shapes(options.data) or options.val_fraction == 0:
        require(find_split(place, "val") is not None, f"{options.data} has no images to judge by: give --val-fraction.")
        return place
    images, file = require_split(place, "train")
    document = json.loads(file.read_text(encoding="utf-8"))
    records = sorted(document["images"], key=lambda image: image["id"])
    apart = random.Random(0).sample(records, round(len(records) * options.val_fraction))
    require(0 < len(apart) < len(records), f"{file} has too few images for --val-fraction {options.val_fraction}.")
    ids = {image["id"] for image in apart}
    written = {}
    for split, chosen in (("val", True), ("train", False)):
        written[split] = Path(options.output, "data", f"{split}.json").resolve()
        inside = {
            "images": [image for image in records if (image["id"] in ids) == chosen],
            "annotations": [each for each in document["annotations"] if (each["image_id"] in ids) == chosen],
        }
        write_json(written[split], document | inside, indent=None)
    folder = str(images.resolve())
    return LocationOptions(
        train_images=folder,
        train_annotations=str(written["train"]),
        val_images=folder,
        val_annotations=str(written["val"]),
    )


def words(configuration: str, place: LocationOptions, seed: int, options: AccuracyOptions, folder: Path) -> list[str]:
    """Return the command line of a run."""
    model, *asked = shlex.split(configuration)
    named = [] if model in MODULES else ["--model", model]
    given = {name: value for name, value in place.to_dict().items() if value not in (None, False)}
    if place.train_images:
        del given["data"]
    given |= {"minutes": options.minutes, "seed": seed, "output": str(folder)}
    return [sys.executable, "-m", MODULES.get(model, "detr_fast.train"), *named, *flags(given), *asked]


def finished(folder: Path, configuration: str, seed: int, minutes: float) -> AccuracyRun:
    """Read a run's accuracy at its evaluations from its metrics.csv."""
    rows = [row for row in read_rows(folder / "metrics.csv") if row["kind"] == "val"]
    seconds, ap, ap50 = ([float(row[name] or "nan") for row in rows] for name in ("trained_seconds", "AP", "AP50"))
    return AccuracyRun(configuration, seed, minutes, tuple(zip(seconds, ap, ap50, strict=True)))


def measured(options: AccuracyOptions, known: list[AccuracyRun], console: Console) -> Iterator[AccuracyRun]:
    """Make, in turns, every run that is not among `known`, and yield it."""
    place, made = set_apart(options), {(run.configuration, run.seed) for run in known}
    for seed in options.seeds:
        for configuration in options.configurations:
            if (configuration, seed) in made:
                continue
            folder = Path(options.output, "runs", f"{seed} {re.sub('[^A-Za-z0-9._]+', '-', configuration)}")
            shutil.rmtree(folder, ignore_errors=True)  # of a run that failed, or was stopped with this command
            run = one_run(words(configuration, place, seed, options, folder), configuration, seed, options, folder)
            console.print(f"seed {seed}  {configuration:40} {run.text()}")
            yield run


def one_run(command: list[str], configuration: str, seed: int, options: AccuracyOptions, folder: Path) -> AccuracyRun:
    """Train once; a run that fails or hangs has a note instead of figures."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    nothing = AccuracyRun(configuration, seed, options.minutes, ())
    with open_growing(Path(f"{folder}.log")) as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(60 * (2 * options.minutes + START_MINUTES))
        except subprocess.TimeoutExpired:
            return replace(nothing, note="it was stopped: it took more than twice its minutes")
        finally:
            stop(process)
    if code:
        last = Path(f"{folder}.log").read_text(encoding="utf-8").strip().rpartition("\n")[2]
        return replace(nothing, note=f"exit code {code}: {last}")
    return finished(folder, configuration, seed, options.minutes)


def known_runs(folder: Path, about: dict[str, Any]) -> list[AccuracyRun]:
    """Read the whole runs of `folder`. Raises UserError where they are of other data or minutes than `about` says."""
    found = read_object(folder / ACCURACY_FILE, "accuracy")
    if found is None:
        return []
    for name in ("data", "val_fraction", "minutes"):
        same = found.get(name) == about[name]
        require(same, f"{folder} has runs with {name} {found.get(name)}, not {about[name]}: give another --output.")
    return [run for each in found["runs"] if not (run := AccuracyRun.from_dict(each)).note]


def main(options: AccuracyOptions) -> int:
    console, output = Console(), Path(options.output)
    about: dict[str, Any] = {
        "data": options.data,
        "val_fraction": 0.0 if is_shapes(options.data) else options.val_fraction,
        "minutes": options.minutes,
    }
    runs = known_runs(output, about)
    about["machine"] = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")).to_dict()
    for run in measured(options, runs, console):
        runs = [*runs, run]
        write_json(output / ACCURACY_FILE, about | {"runs": [each.to_dict() for each in runs]})
    show(accuracy_sections(about | {"runs": [each.to_dict() for each in runs]}), console)
    write_report(output)
    console.print(f"{output / HTML_FILE} opens in any browser, without a network.")
    return int(any(run.note for run in runs))
