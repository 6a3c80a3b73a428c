"""Cache of what was measured to be fastest on this machine: `python -m detr_profiling tune` writes, `auto` reads it.

An entry is one JSON file in the cache folder. It belongs to a device with its driver and the versions of what
computes there, to an architecture, a batch, the options given by name, and images of up to twice or half the size; it
says which switches are to differ from the first guess, and what every candidate took. Where any of that is another
there is no entry.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from detr_kernels import OPERATIONS
from typeguard import TypeCheckError, check_type

from detr_fast.config import Checked, ModelConfig, UserError, require
from detr_fast.files import explained, write_json
from detr_fast.machine import environment
from detr_fast.options import Precision, RuntimeOptions
from detr_fast.paths import cache_folder

Mode = Literal["training", "inference"]
FORMAT = 2
"""The version of the file's format; a file of another one is void."""


RUNTIME_SWITCHES: dict[str, Any] = {
    "precision": Precision,
    "channels_last": bool,
    "compile": bool,
    "capture": bool,
    "threads": int,
    "optimize": bool,
}
"""Switches that are options of a run, and their types; the others are operations, and their values backends."""


def checked_choices(choices: dict[str, Any]) -> dict[str, Any]:
    """Return `choices`. Raises UserError for a switch or a value that this version does not know."""
    for name, value in choices.items():
        if name in OPERATIONS:
            require(value in OPERATIONS[name].names, f"{name} has no backend {value!r}")
            continue
        require(name in RUNTIME_SWITCHES, f"there is no switch {name!r}")
        try:
            check_type(value, RUNTIME_SWITCHES[name])
        except TypeCheckError as error:
            raise UserError(f"{name}: {value!r} {error}") from error
    return choices


Measured = dict[str, tuple[Any, str]]
"""Switch -> its value, and what was measured that made it so."""


@dataclass(frozen=True, kw_only=True)
class Case(Checked):
    """The case that an entry is for: architecture, mode, batch, image size, and options asked for by name."""

    architecture: str
    mode: Mode
    batch_size: int
    pixels: int
    """Pixels of an image, on average."""
    named: str = ""
    """Switches that are asked for by name, as in "precision fp32, compile True"."""

    @classmethod
    def of(
        cls, config: ModelConfig, mode: Mode, batch_size: int, height: int, width: int, options: RuntimeOptions
    ) -> Self:
        """Build from a model's configuration and the size of its images in pixels, whatever the number of classes."""
        return cls(
            architecture=(
                f"{config.backbone}{' DC5' * config.dilation}, {config.encoder_layers}+{config.decoder_layers} layers, "
                f"width {config.hidden_dim}, {config.num_heads} heads, {config.feedforward_dim} inside, "
                f"{config.num_queries} queries, dropout {config.dropout:g}"
            ),
            mode=mode,
            batch_size=batch_size,
            pixels=height * width,
            named=", ".join(f"{name} {value}" for name, value in options.asked().items()),
        )

    @classmethod
    def of_inference(cls, config: ModelConfig, batch_size: int, options: RuntimeOptions) -> Self:
        """Build for photographs of 4:3, at the size that the model sees them."""
        width = min(config.max_size, round(config.image_size * 4 / 3))
        return cls.of(config, "inference", batch_size, config.image_size, width, options)

    def distance(self, other: Self) -> float:
        """Return the ratio of the image sizes, 1 or more; infinite where anything else differs."""
        if replace(self, pixels=other.pixels) != other:
            return math.inf
        return max(self.pixels, other.pixels) / min(self.pixels, other.pixels)

    def text(self) -> str:
        images = "an image" if self.batch_size == 1 else f"{self.batch_size} images"
        asked = f", {self.named}" if self.named else ""
        return f"{self.mode}, {images} of {self.pixels:,} pixels{asked}, {self.architecture}"


FARTHEST = 2.0
"""Factor between the pixels of two cases of which one's entry serves the other."""


@dataclass(frozen=True, kw_only=True)
class Trial(Checked):
    """One candidate beside the best before it, in turns."""

    switch: str
    value: str | bool | int
    verdict: Literal["won", "no faster", "not close", "failed", "not tried"]
    reason: str = ""
    ms: float | None = None
    """Median time of a step."""
    against_ms: float | None = None
    """Median time of the best before it, in the same turns."""
    iqr_ms: float | None = None
    """Least gain that counts: the mean of both interquartile ranges."""
    error: float | None = None
    """Error of the quantity nearest to its limit, where it was compared with the reference."""
    allowed: float | None = None

    def outcome(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict

    def text(self) -> str:
        """Format the outcome with the times, in one line."""
        times = (
            "" if self.ms is None or self.against_ms is None else f", {self.ms:.4g} against {self.against_ms:.4g} ms"
        )
        return f"{self.outcome()}{times}"


@dataclass(frozen=True, kw_only=True)
class Tuning(Checked):
    """An entry: what won, and everything that was tried."""

    environment: dict[str, Any]
    case: dict[str, Any]
    choices: dict[str, Any]
    trials: tuple[dict[str, Any], ...]
    first_guess_ms: float | None = None
    """None, as the next two: it could not be measured."""
    chosen_ms: float | None = None
    iqr_ms: float | None = None
    """Mean of both interquartile ranges, in the turns that ended the measurement."""
    date: str
    commit: str | None = None
    """Commit of the checkout that measured, where it was one."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Check the entry. Raises UserError for a format, case, choice or trial that this version does not know."""
        require(self.format == FORMAT, f"format {self.format}, known is {FORMAT}")
        require(self.parsed_case().pixels > 0, "images without pixels")
        checked_choices(self.choices)
        self.parsed_trials()

    @classmethod
    def of(
        cls, device: torch.device, case: Case, choices: dict[str, Any], trials: Sequence[Trial], **measured: Any
    ) -> "Tuning":
        """Make an entry from what was found on `device`; `measured`: the fields that are times, and the date."""
        tried = tuple(trial.to_dict() for trial in trials)
        return cls(environment=environment(device), case=case.to_dict(), choices=choices, trials=tried, **measured)

    def parsed_case(self) -> Case:
        return Case.from_dict(self.case)

    def parsed_trials(self) -> list[Trial]:
        return [Trial.from_dict(trial) for trial in self.trials]

    def measured(self) -> Measured:
        """List the switches that do not keep the first guess."""
        won = {trial.switch: trial.text() for trial in self.parsed_trials() if trial.verdict == "won"}
        return {name: (value, f"measured here: {won.get(name, 'won')}") for name, value in self.choices.items()}

    def summary(self) -> str:
        """Describe in one line the gain over the first guess, when and among how many it was measured."""
        tried = sum(trial.verdict != "not tried" for trial in self.parsed_trials())
        if self.first_guess_ms is None or self.chosen_ms is None:
            return f"not measured, on {self.date}: the first guess"
        return (
            f"{self.chosen_ms:.4g} ms a step against {self.first_guess_ms:.4g} of the first guess (IQR "
            f"{self.iqr_ms:.2g}), best of {tried + 1} measured on {self.date}"
        )


def entry_path(device: torch.device, case: Case) -> Path:
    """Name the file of the entry of `case` on `device`, whether or not there is one."""
    key = json.dumps([environment(device), case.to_dict()], sort_keys=True)
    return cache_folder() / "tuned" / f"{case.mode}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def read_entry(path: Path) -> Tuning | None:
    """Read the entry in a file; None where there is none, and with a warning where it cannot be used."""
    try:
        return Tuning.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, UserError) as error:
        warnings.warn(f"{path} cannot be used and is ignored ({error}). Measure anew: python -m detr_profiling tune")
        return None


def find(device: torch.device, case: Case) -> Tuning | None:
    """Find the entry on `device` whose images are nearest in size to those of `case`; None where none is near."""
    near = [(Case.from_dict(entry.case).distance(case), entry) for entry in entries_of(device)]
    distance, entry = min(near, key=lambda pair: pair[0], default=(math.inf, None))
    return entry if distance <= FARTHEST else None


def entries_of(device: torch.device) -> Iterator[Tuning]:
    """Yield all entries that hold on `device` now."""
    here, folder = environment(device), cache_folder() / "tuned"
    for path in sorted(folder.glob("*.json")) if os.path.isdir(folder) else ():  # it may lie where nobody may look
        entry = read_entry(path)
        if entry is not None and entry.environment == here:
            yield entry


def require_keeping(device: torch.device, case: Case) -> None:
    """Raise UserError where `keep` could not write: before minutes are spent on it."""
    folder = entry_path(device, case).parent
    with explained(folder, CACHE_ADVICE):
        folder.mkdir(parents=True, exist_ok=True)


CACHE_ADVICE = "Name another cache folder: DETR_FAST_CACHE."


def keep(device: torch.device, entry: Tuning) -> Path:
    """Write `entry` where `find` looks for it; returns the file. Raises UserError where it cannot be written."""
    path = entry_path(device, Case.from_dict(entry.case))
    write_json(path, entry.to_dict(), advice=CACHE_ADVICE)
    return path
