"""`python -m detr_profiling tune`: finds the fastest backends and switches on this machine, for one model and size.

From the first guess on, one switch after another is tried: each of its other values is a candidate, in a process of its
own, and takes turns with the best so far. It wins where it is faster in every turn, by more than the IQR, and as close
to the reference in float64 as eager code is. At the end the best takes turns with the first guess once more; where it
does not win these, the first guess stays. `auto` reads the entry that this writes (`detr_fast.tuning`).
"""

import datetime
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.files import require_writable, write_json
from detr_fast.option_groups import Idle, Options
from detr_fast.options import Output
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.runtime import choose_precision, why_not_measured
from detr_fast.training.autotune import typical_size
from detr_fast.training.batch_size import with_batches
from detr_fast.training.build import make_data
from detr_fast.tuning import Case, Trial, Tuning, keep, require_keeping
from detr_profiling.fed_workload import training_options
from detr_profiling.measuring.candidate import Candidate, CandidateError, compared
from detr_profiling.measuring.machine import commit
from detr_profiling.measuring.measurement import FLOAT64, Configuration, write_references_in_process
from detr_profiling.measuring.switches import Switch, first_guess, switches, value_of, with_value
from detr_profiling.measuring.turns import Turns
from detr_profiling.pages.formats import number
from detr_profiling.pages.report import HTML_FILE, write_report
from detr_profiling.pages.results import TUNE_FILE, read_object
from detr_profiling.pages.terminal import show
from detr_profiling.pages.tuning import tuning_sections
from detr_profiling.workload import Mode, OpenRuntimeOptions, WorkloadOptions

TURN_MS = 400
"""A turn takes about this long, but has at least `LEAST_RUNS` runs."""
LEAST_RUNS, MOST_RUNS = 2, 40
RUNS_ON_A_GPU = 4
"""Runs of a turn on a GPU, each of as many steps back to back as fit into the turn."""
HOPELESS = 1.15
"""A candidate that takes this many times as long after a turn gets no other."""
START_S, COMPILE_S = 120, 900
"""Longest time until a process has run a step, and until a compiled one has."""
SPARE_CORES = 4
COMPILE_NEEDS_S = 120
"""Compiling is not tried where less time is left."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """Find the fastest backends and switches for a model on this machine, and keep them for every `auto`."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("size", lambda o: o.data is not None, "beside --data, which gives its images' size: give one of them"),
    )
    data: str | None = None
    """A data set to train on: sizes, classes and batch are then as `train` takes them from it."""
    minutes: float = 15
    """Time for everything; candidates that do not fit are not tried, and the table says so."""
    turns: int = 4
    """Turns that a candidate and the best so far take."""
    output: Output = "runs/profile"
    """Folder for tune.json, and the report that shows it."""

    workload: WorkloadOptions = WorkloadOptions(runtime=OpenRuntimeOptions())

    def __post_init__(self) -> None:
        require(self.minutes > 0, f"--minutes must be positive, got {self.minutes}.")
        require(self.turns >= 2, f"--turns must be at least 2, got {self.turns}.")
        require(
            self.data is None or self.workload.mode == "training", "--data is for training: give --size for inference."
        )

    def case(self) -> Case:
        asked, options = self.workload.runtime, self.workload.resolved()
        images = options.batch_size or 1
        return Case.of(options.network.config(), options.mode, images, *options.height_width, options=asked)

    def on_its_data(self) -> "TuneOptions":
        """Return the options of what `train` runs on --data. Raises UserError where that cannot be read."""
        if self.data is None:
            return self
        config = training_options(self.workload.but(size="auto"), self.data)
        train_set, _, model = make_data(config.but(batch_size=0))
        device, images = self.workload.resolved().runtime.device, self.workload.batch_size or 0
        batches = with_batches(config.but(batch_size=images), model, device, 1, len(train_set))
        height, width = typical_size(train_set)
        found = {name: getattr(model, name) for name in self.workload.network.field_types() if name != "model"}
        return self.but(data=None, size=f"{height}x{width}", batch_size=batches.optimizer.batch_size, **found)


@dataclass
class Tuner:
    """Holds the best configuration so far, and what was tried on the way."""

    options: TuneOptions
    references: Path
    """Folder with the reference's observations of `compared(options)`."""
    say: Callable[[str], None] = print
    new: Callable[[Configuration], Candidate] = Candidate
    """Makes a candidate of a configuration."""
    trials: list[Trial] = field(default_factory=list)

    ends: float = math.inf
    """When all has to be done, in seconds of `time.perf_counter`."""

    def __post_init__(self) -> None:
        self.best = self.new(first_guess(self.options.workload))
        self.alone = False
        """True if the device's memory does not hold two candidates at once."""
        self.longest_s = 0.0
        """Longest time that a candidate took so far, compiled ones left out."""
        self.runs, self.calls = LEAST_RUNS, 1
        self.turns = self.options.turns
        self.spare: Candidate | None = None
        """A process that has begun while others were timed."""

    def search(self, among: Sequence[Switch]) -> Turns:
        """Try every value of every switch; returns the last turns, of the first guess and of what was found. Raises
        UserError where the first guess itself cannot be measured."""
        guess = self.best.configuration
        try:
            timing = self.best.time(LEAST_RUNS, self._limit_s(self.best))
            steps = round(TURN_MS / timing.median_ms)
            self.runs, self.calls = min(MOST_RUNS, max(LEAST_RUNS, steps)), 1
            if guess.options.runtime.device == "cuda":
                self.runs, self.calls = RUNS_ON_A_GPU, max(1, steps // RUNS_ON_A_GPU)
            for switch in among:
                for value in switch.values:
                    beaten = self._has_won(switch.name) and value == value_of(guess, switch.name)
                    if beaten or value == value_of(self.best.configuration, switch.name):
                        continue
                    if fills_the_device(self.best):
                        self.alone, self.turns = True, 2
                    self.trials.append(self._tried(switch.name, value))
                    self.say(f"{switch.name.replace('_', ' ')} {value}: {self.trials[-1].text()}")
            return self._last_turns(guess)
        except CandidateError as error:
            raise UserError(f"What runs here by default cannot be measured: {error}.") from error
        finally:
            for each in filter(None, (self.best, self.spare)):
                each.close()

    def _last_turns(self, guess: Configuration) -> Turns:
        """Take turns of the first guess and the best; where that is the first guess, time it alone."""
        if self.best.configuration == guess:
            alone = [self.best.time(self.runs, self._limit_s(self.best), self.calls)]
            return Turns(alone, alone)
        turns, first = Turns(), self._begun(guess)
        try:
            self._take_turns(first, self.best, turns)
        finally:
            first.close()
        return turns

    def _has_won(self, switch: str) -> bool:
        return any(trial.switch == switch and trial.verdict == "won" for trial in self.trials)

    def choices(self, turns: Turns) -> dict[str, Any]:
        """Return what won, where it has won the last turns too; else nothing."""
        won = {trial.switch for trial in self.trials if trial.verdict == "won"}
        kept = won if turns.why_no_gain() is None else set()
        return {name: value_of(self.best.configuration, name) for name in kept}

    def _tried(self, switch: str, value: Any) -> Trial:
        trial = partial(Trial, switch=switch, value=value)
        configuration = with_value(self.best.configuration, switch, value)
        compiled = configuration.options.runtime.compile
        if problem := self._why_not_tried(switch, value, COMPILE_NEEDS_S if compiled else self.longest_s):
            return trial(verdict="not tried", reason=problem)
        began = time.perf_counter()
        candidate, turns = self._begun(configuration), Turns()
        try:
            self._take_turns(self.best, candidate, turns)
            best, found = turns.joined()
            trial = partial(trial, ms=found.median_ms, against_ms=best.median_ms, iqr_ms=turns.iqr_ms)
            if problem := turns.why_no_gain():
                return trial(verdict="no faster", reason=problem)
            judged = candidate.judge(self._references(), self._limit_s(candidate))
            trial = partial(trial, error=judged["error"], allowed=judged["allowed"])
            if not judged["close"]:
                return trial(verdict="not close", reason=f"{judged['quantity']} errs by {number(judged['error'])}")
            self.best, candidate = candidate, self.best
            return trial(verdict="won")
        except CandidateError as error:
            if self.best.process is None:  # it begins again when it is asked next
                self.alone = self.best.configuration.options.runtime.device == "cuda"
                return trial(verdict="failed", reason=f"the best so far does not run beside it: {error}")
            return trial(verdict="failed", reason=str(error))
        finally:
            candidate.close()
            if not compiled:
                self.longest_s = max(self.longest_s, time.perf_counter() - began)

    def _why_not_tried(self, switch: str, value: Any, needs_s: float) -> str | None:
        """Say why a candidate is left out. Time is kept for the last turns, which take about as long as one."""
        options = self.best.configuration.options
        config, device = options.network.config(), torch.device(options.runtime.device)
        dtype, _ = choose_precision(options.runtime.precision, device)
        problem = why_not_measured(switch, value, device, dtype, config.hidden_dim // config.num_heads, options.mode)
        short = self.ends - time.perf_counter() < needs_s + self.longest_s
        return problem or ("no time left" if short else None)

    def _references(self) -> Path:
        """Return the folder of the reference's observations, made at the first call: float64 takes its time."""
        if not (self.references / FLOAT64).exists():
            write_references_in_process(compared(first_guess(self.options.workload).options), self.references)
        return self.references

    def _begun(self, configuration: Configuration) -> Candidate:
        """Begin a candidate of it. Beside a GPU, where there are cores to spare, the next process begins already."""
        candidate, self.spare = self.spare or self.new(configuration), None
        candidate.configuration = configuration
        if configuration.options.runtime.device == "cuda" and (os.cpu_count() or 1) >= SPARE_CORES:
            self.spare = self.new(configuration)
            self.spare.start()
        return candidate

    def _take_turns(self, best: Candidate, candidate: Candidate, turns: Turns) -> None:
        """Take all turns, or until the candidate is without hope. Raises CandidateError where one cannot be timed."""
        sides = [(best, candidate, turns.best), (candidate, best, turns.candidate)]
        for _ in range(self.turns):
            for side, other, timings in sides:
                if self.alone:
                    other.park()
                timings.append(side.time(self.runs, self._limit_s(side), self.calls))
            sides.reverse()
            slower, faster = turns.joined()
            if faster.median_ms > HOPELESS * slower.median_ms:
                return

    def _limit_s(self, side: Candidate) -> float:
        """Return the seconds that a process may take to answer: those that are left, but enough for one that works."""
        longest_s = COMPILE_S if side.configuration.options.runtime.compile else START_S
        return max(min(longest_s, self.ends - time.perf_counter()), 20 + self.longest_s)


def fills_the_device(candidate: Candidate) -> bool:
    """Tell whether a GPU's memory holds no second one."""
    device = torch.device(candidate.configuration.options.runtime.device)
    if device.type != "cuda":
        return False
    return candidate.peak_mib * 2 * 1.2 > torch.cuda.get_device_properties(device).total_memory / 2**20


def tune(options: TuneOptions, say: Callable[[str], None]) -> Tuning:
    """Search, and make the entry of what was found.

    Where a batch does not fit into the memory, a smaller one is measured, since training computes it in parts then.
    """
    ends, case = time.perf_counter() + 60 * options.minutes, options.case()
    with tempfile.TemporaryDirectory() as folder:
        while True:
            tuner = Tuner(options, Path(folder), say, ends=ends)
            try:
                turns = tuner.search(switches(options.workload))
                break
            except UserError as error:
                images = options.workload.resolved().batch_size or 1
                if images == 1 or not is_out_of_memory(RuntimeError(error)):
                    raise
                options = options.but(batch_size=images // 2)
                say(f"{images} images do not fit into the memory at once: measured with {images // 2}")
    choices, (first, found) = tuner.choices(turns), turns.joined()
    return Tuning.of(
        torch.device(options.workload.resolved().runtime.device),
        case,
        choices,
        tuner.trials,
        first_guess_ms=first.median_ms,
        chosen_ms=found.median_ms if choices else first.median_ms,
        iqr_ms=turns.iqr_ms,
        date=datetime.date.today().isoformat(),
        commit=commit(),
    )


def write_result(entry: Tuning, mode: Mode, folder: Path) -> None:
    """Write the entry into tune.json, where another mode's stays, and the report. Raises UserError where that fails."""
    path = folder / TUNE_FILE
    entries = (read_object(path, "tune") or {}) | {mode: entry.to_dict()}
    write_json(path, entries)
    write_report(folder)


def main(options: TuneOptions) -> int:
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no candidate outlives this
    require(options.workload.runtime.kernels != "ref", "--kernels ref leaves nothing to choose: leave it out.")
    torch.set_num_threads(options.workload.runtime.threads or torch.get_num_threads())
    options = options.on_its_data()
    require_writable("--output", Path(options.output))
    require_keeping(torch.device(options.workload.resolved().runtime.device), options.case())
    console.print(f"What is fastest for {options.case().text()}? At most {number(options.minutes)} minutes.")
    entry = tune(options, console.print)
    path = keep(torch.device(options.workload.resolved().runtime.device), entry)
    write_result(entry, options.workload.mode, Path(options.output))
    show(tuning_sections({options.workload.mode: entry.to_dict()}), console)
    for name, value in entry.choices.items():
        console.print(f"{name.replace('_', ' '):>18}  {value}")
    if entry.choices:
        gain = (entry.first_guess_ms or 0) / (entry.chosen_ms or 1)
        console.print(f"{number(gain)} times the speed of the first guess: {entry.summary()}")
    else:
        console.print("The first guess stays.")
    console.print(f"Cached in {path}, which every `auto` reads; {Path(options.output, HTML_FILE)} shows it.")
    return 0
