"""A training step whose first calls torch's profiler records: `train --profile N`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from detr_fast.data.batch import Batch
from detr_fast.files import atomic_write
from detr_fast.training.run_folder import RunFolder

WARM_UP_STEPS = 3
"""Left out of the trace: they compile, capture, choose algorithms and make the optimizer's state."""


class ProfiledStep:
    """Calls a step, and writes a trace of some of its calls, and of what lies between them, in Chrome's format.

    The numbers stay the same. Use it as a context: at its end a run that was shorter writes what there is.
    """

    def __init__(
        self,
        take_step: Callable[[Sequence[Batch]], Any],
        steps: int,
        folder: RunFolder,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.take_step, self.steps, self.folder, self.say = take_step, steps, folder, say
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        plan = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *on_gpu], schedule=plan, on_trace_ready=self._write, acc_events=True
        )

    def __enter__(self) -> "ProfiledStep":
        self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.profiler.step_num < WARM_UP_STEPS + self.steps:
            self.profiler.stop()
        if self._recorded() < 1:
            self.say(f"No trace was written: the first {WARM_UP_STEPS} steps are left out, and the run made no more.")

    def __call__(self, batches: Sequence[Batch]) -> Any:
        terms = self.take_step(batches)
        if self.profiler.step_num < WARM_UP_STEPS + self.steps:
            self.profiler.step()
            if self.profiler.step_num == WARM_UP_STEPS + self.steps:
                self.profiler.stop()
        return terms

    def _recorded(self) -> int:
        return self.profiler.step_num - WARM_UP_STEPS

    def _write(self, profiler: profile) -> None:
        if self._recorded() < 1:
            return
        with atomic_write(self.folder.trace) as file:
            profiler.export_chrome_trace(file.name)
        self.say(
            f"A trace of {self._recorded()} steps is in {self.folder.trace}: open it in ui.perfetto.dev or "
            "chrome://tracing. `python -m detr_profiling trace` says what it means."
        )
