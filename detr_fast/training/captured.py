"""The optimizer step as CUDA graphs: the gradients, one graph for each shape of a micro-batch, and the update.

From the model's input to the last write of AdamW and the EMA model, with the assignment inside. What several processes
exchange lies between and before: a rank that meets a new shape runs while another replays, so no graph may hold a
collective. Their gradients are averaged by one call after the backward pass, where DistributedDataParallel exchanges
the first while the last are still computed: 165 MB of float32 for a ResNet-50 detector, which nothing hides.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from detr_fast.recording import Recorder, Recordings
from detr_fast.training.distributed import World
from detr_fast.training.step_input import StepInput

MOST_RECORDINGS = 128
"""DETR's augmentation of COCO has about 90 shapes of batches, in steps of 64 pixels."""
FULL = f"{MOST_RECORDINGS} shapes of batches are captured as CUDA graphs: steps of other shapes run uncaptured."
Terms = dict[str, Tensor]


class CapturedStep:
    """`gradients` of one micro-batch, added to the parameters' `.grad`, and `update`, each from a graph cache.

    The gradients of all shapes lie in one tensor, which is in no graph's memory: it is what several processes average,
    and what the one graph of the update reads. A parameter that no loss depends on has gradient zero.
    """

    def __init__(
        self,
        gradients: Callable[[StepInput, Tensor], Terms],
        update: Callable[[], Terms],
        parameters: Sequence[nn.Parameter],
        world: World,
        recorder: Recorder,
    ) -> None:
        self._gradients = gradients
        self._update = update
        self.world = world
        self.recorder = recorder
        self.flat = flat_gradients(parameters)
        self.micro_batches = Recordings(recorder, MOST_RECORDINGS, FULL)
        self.updates = Recordings(recorder, 1)

    def gradients(self, inputs: Sequence[StepInput], normalizers: Tensor) -> list[Terms]:
        """Computes those of a whole step, averaged over all processes; returns each micro-batch's terms."""
        self.flat.zero_()
        terms = [self.micro_batches(self._of_micro_batch, (given, normalizers)) for given in inputs]
        if self.world.size > 1:
            self.world.sum(self.flat.div_(self.world.size))
        return terms

    def update(self) -> Terms:
        return self.updates(lambda _: self._update(), ())

    def replays(self, inputs: Sequence[StepInput], normalizers: Tensor) -> bool:
        """Returns whether the gradients' graphs are all there, so that computing them takes no more memory."""
        return all((given, normalizers) in self.micro_batches for given in inputs)

    def try_out(self, given: StepInput, normalizers: Tensor) -> None:
        """Captures one micro-batch's gradients, and takes the memory that it takes to run others beside the graph.
        Raises torch.OutOfMemoryError where either does not fit."""
        for _ in range(2):
            self.micro_batches(self._of_micro_batch, (given, normalizers))
        if not self.replays([given], normalizers):
            raise torch.OutOfMemoryError("the memory has no room for the CUDA graph of the largest batch")
        self.recorder.run(lambda: self._gradients(given, normalizers))

    def forget(self) -> None:
        """Gives the memory of all graphs back."""
        for cache in (self.micro_batches, self.updates):
            cache.forget()

    def _of_micro_batch(self, inputs: tuple[StepInput, Tensor]) -> Terms:
        return self._gradients(*inputs)


ALIGNMENT = 128
"""In elements: 512 bytes of float32, as torch's allocator aligns."""


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The one tensor of zeros that each parameter's `.grad` is from now on a part of, in the parameter's own order."""
    sizes = (-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters)
    *starts, total = accumulate(sizes, initial=0)
    flat = parameters[0].new_zeros(total)
    for parameter, start in zip(parameters, starts, strict=True):
        parameter.grad = flat.as_strided(parameter.shape, parameter.stride(), start)
    return flat
