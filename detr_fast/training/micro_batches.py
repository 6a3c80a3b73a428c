"""The optimizer step of batches that do not fit into memory, computed in micro-batches that do."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detr_fast.config import require
from detr_fast.data.batch import Batch
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.profiler_ranges import profiler_range
from detr_fast.training.distributed import all_reduce_later
from detr_fast.training.snapshot import ForwardSnapshot
from detr_fast.training.step import Terms, TrainStep
from detr_fast.training.step_input import StaticShape, StepInput, step_input

TryOut = Callable[[StepInput, Tensor], object]
"""Computes the gradients of one micro-batch, by normalizers (2,), to see whether the memory suffices."""


class MicroBatches:
    """Makes a `TrainStep` compute each batch in `count` micro-batches, and in more once the memory runs out.

    The step is the same, but for live batch norm, whose statistics are each micro-batch's own.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.count = 1
        self.shortage = ""
        """The text of the last out-of-memory error."""

    def __call__(self, batches: Sequence[Batch]) -> Terms:
        """Make one step: see `TrainStep`.

        Where the memory runs out, `count` is doubled and the gradients are computed again from the same random state.
        Raises UserError where single images do not fit, and with several processes the out-of-memory error itself:
        the other ranks would wait for the gradients of one that starts again.
        """
        with profiler_range("forward"):
            before = ForwardSnapshot(self.step.model, self.step.runtime.device)
        count = self.count
        while True:
            try:
                terms = self.step.gradients(self.split(batches))
                break
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.step.world.size > 1:
                    raise
                self.shortage = str(error)
            self.halve(batches)
            self._release(before)  # outside of the handler, whose traceback keeps what was computed
        if self.count > count:
            warnings.warn(f"The memory ran out: from now on each batch is computed in {self.count} micro-batches.")
        return terms | self.step.update()

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the micro-batches of a step, each padded as its batch."""
        return [micro_batch for batch in batches for micro_batch in batch.split(self.count)]

    def find_micro_batch_size(self, batch: Batch) -> None:
        """Double `count` until `batch`, as large as any to come, fits into the memory of every rank.

        Nothing is trained. Raises UserError where single images do not fit.
        """
        while not self.fits(batch, self.step.micro_batch):
            self.halve([batch])

    def fits(self, batch: Batch, try_out: TryOut, shape: StaticShape | None = None) -> bool:
        """Tell whether every rank has memory for `try_out` on the micro-batches of `batch`, beside AdamW's moments.

        Batch norm statistics and random state are restored. `shape`: that of a graphed step, whose gradients
        keep their memory.
        """
        step, before = self.step, ForwardSnapshot(self.step.model, self.step.runtime.device)
        moments: list[Tensor] = []
        fits = True
        try:
            if not step.optimizer.state:
                moments += [torch.empty_like(each) for each in step.trained * 2]
            with all_reduce_later(step.synchronized, True):
                for micro_batch in self.split([batch]):
                    given = step_input(micro_batch, step.preprocessing, shape)
                    try_out(given, torch.ones(2, device=step.runtime.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.shortage, fits = str(error), False
        moments.clear()
        self._release(before, gradients=shape is None)
        return not step.world.any(not fits, step.runtime.device)

    def halve(self, batches: Sequence[Batch]) -> None:
        """Double `count`. Raises UserError where each micro-batch of `batches` is a single image already."""
        height, width = max((batch.padded_size for batch in batches), key=math.prod)
        require(
            self.count < max(len(batch.images) for batch in batches),
            f"A single image of {width}x{height} pixels does not fit into the memory in training. "
            "Give smaller --train-sizes and --max-size, or --checkpoint-activations. "
            f"({self.shortage.partition('.')[0] or 'The memory ran out on another device'})",
        )
        self.count *= 2

    def _release(self, before: ForwardSnapshot, gradients: bool = True) -> None:
        if gradients:
            self.step.optimizer.zero_grad(set_to_none=True)
        before.restore()
