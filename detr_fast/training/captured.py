"""The optimizer step as two recordings: the gradients, one for each shape of the window's batches, and the update.

From the model's input to the last write of AdamW and the average, with the assignment inside. What several processes
exchange lies between and before: a rank that meets a new shape runs while another replays, so no recording may hold a
collective. Their gradients are averaged by one call after the backward pass, where DistributedDataParallel exchanges
the first while the last are still computed: 165 MB of float32 for a ResNet-50 detector, which nothing hides.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from detr_fast.recording import Recorder, Recordings
from detr_fast.training.distributed import World

MOST_RECORDINGS = 128
"""DETR's augmentation of COCO has about 80 shapes of batches, in steps of 64 pixels."""
FULL = f"{MOST_RECORDINGS} shapes of batches are recorded: steps of other shapes run as they are."
Terms = dict[str, Tensor]


class StepInput(NamedTuple):
    """One batch as a step takes it, on the device."""

    images: Tensor
    """(B, 3, H, W), normalised"""
    mask: Tensor | None
    """(B, H, W), True where padded; None: nothing is"""
    labels: Tensor
    """(B, T) int64"""
    boxes_cxcywh: Tensor
    """(B, T, 4)"""
    objects: Tensor
    """(B,) int64, how many of the T are an image's"""


class CapturedStep:
    """`gradients`, added to the parameters' `.grad`, and `update`, each as a recording.

    The gradients of all shapes lie in one tensor, which is in no graph's memory: it is what several processes average,
    and what the one recording of the update reads. A parameter that no loss depends on has gradient zero.
    """

    def __init__(
        self,
        gradients: Callable[[list[StepInput], Tensor], Terms],
        update: Callable[[], Terms],
        parameters: Sequence[nn.Parameter],
        world: World,
        recorder: Recorder,
    ) -> None:
        self.gradients = gradients
        self.update = update
        self.world = world
        self.flat = flat_gradients(parameters)
        self.windows = Recordings(recorder, MOST_RECORDINGS, FULL)
        self.updates = Recordings(recorder, 1)

    def __call__(self, inputs: list[StepInput], normalizers: Tensor) -> Terms:
        terms = self.windows(self._gradients, (inputs, normalizers))
        self.world.sum(self.flat)
        return terms | self.updates(lambda _: self.update(), ())

    def _gradients(self, window: tuple[list[StepInput], Tensor]) -> Terms:
        self.flat.zero_()
        terms = self.gradients(*window)
        if self.world.size > 1:
            self.flat.div_(self.world.size)
        return terms


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
