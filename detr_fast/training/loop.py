"""The training loop: batches to steps, steps to epochs; logs, evaluates, saves."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from detr_fast.config import UserError
from detr_fast.data.batch import Batch
from detr_fast.evaluation.coco_metrics import Evaluation
from detr_fast.profiler_ranges import profiler_range
from detr_fast.training.checkpoint import Progress, RunFacts, TrainingState
from detr_fast.training.display import TrainingDisplay
from detr_fast.training.distributed import share_buffers
from detr_fast.training.interruption import Interruption
from detr_fast.training.meter import Meter
from detr_fast.training.metrics_log import MetricsLog
from detr_fast.training.optimizer import Schedule
from detr_fast.training.run_folder import RunFolder
from detr_fast.training.step import TrainStep

WARM_UP_STEPS, FIRST_PLAN_STEP = 3, 20
"""Steps of a process before its pace is measured, and after which it is used first."""
MOST_NONFINITE_READINGS = 20
"""Log lines with non-finite matching costs or gradients after which a run stops; a non-finite loss stops it at once."""


@dataclass
class TrainingLoop:
    """Makes steps of `batches` to the schedule's end; `evaluate` gives the validation metrics of the model to keep.

    With --minutes the schedule's end is planned: from the pace of the first steps, and anew after every epoch.
    """

    step: TrainStep
    take_step: Callable[[list[Batch]], Any]
    """`step`, or what wraps it: `MicroBatches`, `GraphedStep`."""
    schedule: Schedule
    batches: Iterator[Batch]
    batches_per_epoch: int
    evaluate: Callable[[], Evaluation]
    folder: RunFolder | None
    """None on ranks that write nothing."""
    log: MetricsLog | None
    display: TrainingDisplay
    facts: RunFacts
    progress: Progress = field(default_factory=Progress)
    evaluation: Evaluation | None = None
    """The latest."""

    def __post_init__(self) -> None:
        self.options = self.facts.options
        self.minutes = self.options.optimizer.minutes
        self.meter = Meter(self.step.runtime.device, self.step.world, self.step.sums)
        self._began = time.perf_counter() - self.progress.seconds
        self._first_step = self.progress.step
        self._evaluating = self.progress.seconds - self.progress.trained_seconds
        self._warm: tuple[int, float] | None = None
        self._skipped: set[str] = set()

    def run(self, interruption: Interruption) -> int:
        """Train to the end or to a signal; returns the exit code."""
        self.step.model.train()
        self.meter.restart()
        while True:
            if self._evaluation_is_due():  # asked first, since a run may have been stopped just before one
                self._evaluate()
                self._save()
            if self.progress.step >= self.total_steps:
                return 0
            self._advance()
            self._plan()
            stopping = self._agreed(interruption)
            saving = stopping or self._ended_epoch() or self._is_last() or self._due(self.options.save_every)
            if saving or self._due(self.options.log_every):
                self._read()
            if saving:
                self._save()
            if stopping:
                self.display.print(f"Stopped after step {self.progress.step}; --resume auto goes on from here.")
                return interruption.exit_code or 128 + signal.SIGTERM  # another rank was asked to stop

    def _is_last(self) -> bool:
        return self.progress.step == self.total_steps

    def _evaluation_is_due(self) -> bool:
        epochs = self._ended_epoch()
        due = self._is_last() or (epochs > 0 and epochs % self.options.eval_every == 0)
        return due and self.progress.evaluated_step != self.progress.step

    def _advance(self) -> None:
        """Make one optimizer step; a resumed run repeats its random numbers, which follow from (seed, step, rank)."""
        asked = time.perf_counter()
        with profiler_range("data wait"):
            batches = [next(self.batches) for _ in range(self.options.optimizer.accumulate)]
        waited = time.perf_counter() - asked
        self._name_skipped(batches)
        seed = np.random.SeedSequence((self.options.seed % 2**64, self.progress.step, self.step.world.rank))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0]) >> 1)
        self.schedule.apply(self.step.optimizer, self.progress.step)
        self.step.warm_ema_up(self.progress.step)
        self.take_step(batches)
        self.progress.step += 1
        padding_overhead = sum(batch.padding_overhead for batch in batches) / len(batches)
        self.meter.add(sum(len(batch.image_ids) for batch in batches), waited, padding_overhead)

    def _plan(self) -> None:
        """Let the schedule of --minutes end with the step that, at the pace so far, ends within them."""
        done, now = self.progress.step - self._first_step, self._trained()
        if not self.minutes or done < WARM_UP_STEPS:
            return
        self._warm = self._warm or (self.progress.step, now)
        first, began = self._warm
        spent = self.step.world.size == 1 and now >= 60 * self.minutes  # of several ranks none may plan alone
        if self.progress.step > first and (done == FIRST_PLAN_STEP or self._ended_epoch() or spent):
            pace = (now - began) / (self.progress.step - first)
            left = max(0.0, 60 * self.minutes - now) / pace
            average = self.step.world.sum(torch.tensor(left, device=self.step.runtime.device)) / self.step.world.size
            self.progress.planned_steps = self.progress.step + round(average.item())
            self.schedule = self.schedule.of(self.progress.planned_steps)
            self.display.plan(self.total_steps, math.ceil(self.epochs_of(self.total_steps)))

    @property
    def total_steps(self) -> int:
        return self.schedule.total_steps

    def _name_skipped(self, batches: list[Batch]) -> None:
        """Print each image that could not be read once, with --on-bad-image skip."""
        for path in {path for batch in batches for path in batch.skipped} - self._skipped:
            self._skipped.add(path)
            self.display.print(f"skipped ({len(self._skipped)} so far), cannot be read: {path}")

    @property
    def epoch(self) -> float:
        """Return the epochs done, with the fraction of the present one."""
        return self.epochs_of(self.progress.step)

    def epochs_of(self, steps: int) -> float:
        return steps * self.options.optimizer.accumulate / self.batches_per_epoch

    def _ended_epoch(self) -> int:
        """Return the number of epochs done, if this step ended one, else 0."""
        before = (self.progress.step - 1) * self.options.optimizer.accumulate // self.batches_per_epoch
        return int(self.epoch) if int(self.epoch) > before else 0

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _agreed(self, interruption: Interruption) -> bool:
        """Tell whether to stop: one process at any step, several ranks at log lines, where they agree."""
        asked = interruption.signal_number is not None
        if self.step.world.size == 1:
            return asked
        if not self._due(self.options.log_every):
            return False
        flag = torch.tensor(float(asked), device=self.step.runtime.device)
        return bool(self.step.world.sum(flag).item())

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _trained(self) -> float:
        """Return the seconds that the run has trained, without its evaluations."""
        return self._seconds() - self._evaluating

    def _read(self) -> None:
        """Read the device's sums, check them, and show them."""
        if self.meter.steps == 0:
            return
        values = self.meter.read() | {"lr": float(self.step.optimizer.param_groups[0]["lr"])}
        self._check(values)
        done = self.progress.step - self._first_step
        elapsed = self._seconds() - self.progress.seconds
        eta = (self.total_steps - self.progress.step) * elapsed / max(done, 1)
        if self.minutes:
            eta = 60 * self.minutes - self._trained()
        if self.log:
            self.log.write("train", self.epoch, self.progress.step, self._seconds(), values)
            self.display.update(self.epoch, self.progress.step, values, eta)

    def _check(self, values: dict[str, float]) -> None:
        """Raise UserError where loss, costs or gradients are not finite; the last checkpoint is from before."""
        self.progress.nonfinite_readings += values["nonfinite_costs"] > 0 or values["skipped"] > 0
        advice = "Lower --lr or use --precision fp32; --resume auto goes on from the last checkpoint."
        if not math.isfinite(values["loss"]):
            raise UserError(f"The loss is {values['loss']} at step {self.progress.step}. {advice}")
        if self.progress.nonfinite_readings > MOST_NONFINITE_READINGS:
            times = self.progress.nonfinite_readings
            raise UserError(f"Predictions or gradients were not finite at {times} log lines. {advice}")

    def _evaluate(self) -> None:
        share_buffers(self.step.model, self.step.world)
        began = self._seconds()
        self.evaluation = self.evaluate()
        self._evaluating += self._seconds() - began
        self.progress.evaluated_step = self.progress.step
        metrics = self.evaluation.measured
        ap = metrics.get("AP", -math.inf)
        self.step.model.train()
        if self.log and self.folder:
            found = metrics | self.evaluation.unlimited | {"trained_seconds": self._trained()}
            self.log.write("val", self.epoch, self.progress.step, self._seconds(), found)
            self.display.print(f"epoch {int(self.epoch)}: {self.evaluation.line()}")
            if ap > self.progress.best_ap or self.progress.best_ap < 0:
                model = self.step.ema or self.step.model
                self.facts.save_model(self.folder.best, model.state_dict(), self.progress.step)
        self.progress.best_ap = max(self.progress.best_ap, ap)
        self.meter.restart()

    def _save(self) -> None:
        """Save what is needed to continue the run as if it had not stopped."""
        share_buffers(self.step.model, self.step.world)
        if not self.folder:
            return
        ema = self.step.ema
        state = TrainingState(
            **vars(self.facts),
            model=self.step.model.state_dict(),
            ema=ema.state_dict() if ema else None,
            optimizer=self.step.optimizer.state_dict(),
            scaler=self.step.scaler.state_dict(),
            query_sets=self.step.sets.state_dict() if self.step.sets else None,
            progress=replace(self.progress, seconds=self._seconds(), trained_seconds=self._trained()),
        )
        state.save(self.folder.last)
