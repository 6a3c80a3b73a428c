"""Lookup of what is fastest for a run on this machine; on a GPU without an entry, measured before the first step."""

import datetime
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from detr_fast.config import ModelConfig, UserError
from detr_fast.console import Console
from detr_fast.data.coco import CocoDataset
from detr_fast.machine import environment
from detr_fast.option_groups import flags
from detr_fast.options import ArchitectureOptions, TrainOptions
from detr_fast.training.checkpoint import TrainingState
from detr_fast.training.distributed import World
from detr_fast.tuning import Case, Tuning, find, keep

TYPICAL_IMAGES = 256
"""Images whose mean size stands for the data set's."""
MINUTES = 1.0
"""Time for measuring before the first step."""
GRACE_S = 45
"""After that, until a measuring process that does not end by itself is ended."""


def typical_size(train_set: CocoDataset) -> tuple[int, int]:
    """Return the mean (h, w) in pixels that training images get."""
    some = np.linspace(0, len(train_set) - 1, min(len(train_set), TYPICAL_IMAGES)).astype(int)
    height, width = np.mean([train_set.augmentation(0, int(index)).size for index in some], axis=0).round().astype(int)
    return int(height), int(width)


def tuning_of(
    state: TrainingState | None,
    options: TrainOptions,
    train_set: CocoDataset,
    config: ModelConfig,
    device: torch.device,
    world: World,
    console: Console,
) -> Tuning | None:
    """Find the tuning of a run in the main process, and broadcast it to all, which have to run alike.

    A run resumed from `state` on a like machine keeps what it began with, so that its numbers stay the same to the bit
    (on a GPU, where cuDNN chooses its algorithms anew in each process, to rounding). Otherwise, and where --tune or
    --kernels changed, `find_or_measure` is asked.
    """
    if not world.is_main:
        return world.broadcast(None)
    stored = state.tuning if state else None
    as_before = state and all(
        getattr(state.options.runtime, name) == getattr(options.runtime, name) for name in ("tune", "kernels")
    )
    if as_before and (stored is None or stored["environment"] == environment(device)):
        return world.broadcast(Tuning.from_dict(stored) if stored else None)
    return world.broadcast(find_or_measure(options, train_set, config, device, console))


def find_or_measure(
    options: TrainOptions, train_set: CocoDataset, config: ModelConfig, device: torch.device, console: Console
) -> Tuning | None:
    """Look up the entry of a run's case; on a GPU without one, measure first. None where no tuning is wanted."""
    if not options.runtime.tune or options.runtime.kernels == "ref":
        return None
    size = typical_size(train_set)
    case = Case.of(config, "training", options.optimizer.batch_size, *size, options=options.runtime)
    found = find(device, case)
    if found is None and device.type == "cuda" and options.runtime.kernels == "auto":
        console.print(
            f"Nothing was measured here for {case.text()}: measuring, about {MINUTES:.0f} minute (--no-tune)."
        )
        if not measure(list(arguments(options, config, size)), console):
            remember_failure(device, case, console)
        found = find(device, case)
    return found


def remember_failure(device: torch.device, case: Case, console: Console) -> None:
    """Write an entry without choices, so that the next run does not measure in vain again."""
    try:
        keep(device, Tuning.of(device, case, {}, [], date=datetime.date.today().isoformat()))
    except UserError as error:
        console.print(f"{error} Until then each run measures, or takes the first guess with --no-tune.")


def arguments(options: TrainOptions, config: ModelConfig, size: tuple[int, int]) -> Iterator[str]:
    """Return the words with which `tune` measures the same step."""
    height, width = size
    architecture = ArchitectureOptions.field_types().keys() - {"model"}
    values = {name: getattr(config, name) for name in sorted(architecture)} | options.runtime.asked()
    values |= {"model": options.network.model, "size": f"{height}x{width}", "batch_size": options.optimizer.batch_size}
    values |= {"device": options.runtime.device, "minutes": MINUTES, "output": str(Path(options.output, "profile"))}
    return flags(values)


def measure(arguments: list[str], console: Console) -> bool:
    """Run `tune` in a process of its own; return whether it succeeded. A failure does not end the run."""
    command = [sys.executable, "-m", "detr_profiling", "tune", *arguments]
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C, the process is ended
    try:
        code = process.wait(60 * MINUTES + GRACE_S)
        problem = f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = "it did not end"
    finally:
        signal.signal(signal.SIGTERM, before)
        process.terminate()  # not killed: it has processes of its own to end
        process.wait()
    if problem:
        again = shlex.join(command)
        console.print(f"Not measured ({problem}): the first guess is taken. To see why: {again}")
    return problem is None
