"""The optimizer step as CUDA graphs: the gradients, one graph for each shape of a micro-batch, and the update.

They hold everything from the network's input to the last write of AdamW and the EMA model, the assignment included.
Collectives stay outside the graphs: at the same step one rank may replay, and another, that meets a new shape, run
eagerly. So gradients are averaged by one all-reduce after the backward pass, 165 MB of float32 for a ResNet-50
detector, without the overlap that DistributedDataParallel has.
"""

import warnings
from collections.abc import Sequence
from itertools import accumulate

import torch
from detr_kernels import OPERATIONS, Facts
from torch import Tensor, nn

from detr_fast.config import require
from detr_fast.cuda_graphs import Capturer, CudaCapturer, GraphCache
from detr_fast.data.batch import Batch
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.training.distributed import World
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.snapshot import ForwardSnapshot
from detr_fast.training.step import Terms, TrainStep
from detr_fast.training.step_input import StaticShape, StepInput, step_input

MOST_GRAPHS = 128
"""DETR's augmentation of COCO has about 90 shapes of batches, in steps of 64 pixels."""
FULL = f"{MOST_GRAPHS} shapes of batches are captured as CUDA graphs: steps of other shapes run uncaptured."
MEMORY_RAN_OUT = (
    "The memory ran out in a captured step, beside the CUDA graphs. Run without capture or with a smaller "
    "--batch-size; --resume auto goes on from the last checkpoint."
)


class GraphedStep:
    """Captures a `TrainStep` in micro-batches, and replays it as CUDA graphs; the numbers stay the same.

    The gradients of all shapes are written to one tensor outside the graphs' memory, which several processes average,
    and which the one graph of the update reads. A parameter that no loss depends on has gradient zero.
    """

    def __init__(self, micro_batches: MicroBatches, capturer: Capturer | None = None) -> None:
        """Wrap a step. `capturer`: default, CUDA graphs, for which `why_not_graphed` must be None."""
        self.micro_batches, self.step = micro_batches, micro_batches.step
        device = self.step.runtime.device
        self.step.average_gradients_over(World())
        for group in self.step.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)  # read where it lies at each replay
            group["capturable"] = device.type == "cuda"
        if capturer is None:
            capturer = CudaCapturer(device, benchmark=True)
            reason = "measures each shape's algorithms before it is captured (cudnn.benchmark)"
            self.step.runtime.reasons["cuDNN"] = reason
        self.capturer = capturer
        self.shape: StaticShape = StaticShape()
        self.flat = flat_gradients(self.step.trained)
        self.gradient_graphs = GraphCache(capturer, MOST_GRAPHS, FULL)
        self.update_graph = GraphCache(capturer, 1)
        self.gave_up = False
        """True once the memory ran out: steps run eagerly since."""

    @property
    def count(self) -> int:
        """Return the number of micro-batches of a batch."""
        return self.micro_batches.count

    def __call__(self, batches: Sequence[Batch]) -> Terms:
        """Make one step: see `TrainStep`.

        Where the memory runs out, the graphs are given up: this step, from its beginning, and all later ones run
        eagerly. Raises UserError where several processes would have to agree on that.
        """
        if not self.gave_up:
            terms = self._gradients(batches)
            if terms is not None:
                return terms | self.update_graph(lambda _: self.step.update(), ())
            self._give_up()
        return self.micro_batches(batches)

    def find_micro_batch_size(self, batch: Batch) -> None:
        """Find it as `MicroBatches.find_micro_batch_size` does, for a micro-batch beside its graph.

        The largest shape is captured first: all others then reuse its memory. Later batches get as many rows of targets
        as it has, and a mask if it has one, so that shapes are few. Where not even single images fit beside their
        graph, a single process gives the graphs up.
        """
        self.shape = StaticShape.of(batch)
        while not self.micro_batches.fits(batch, self._try_out, self.shape):
            if self.micro_batches.count >= len(batch.images) and self.step.world.size == 1:
                self._give_up()
                self.micro_batches.count = 1
                self.micro_batches.find_micro_batch_size(batch)
                return
            self.micro_batches.halve([batch])
            self._forget()

    def _gradients(self, batches: Sequence[Batch]) -> Terms | None:
        """Compute a step's gradients; None, and the state restored, where the memory runs out."""
        step, before = self.step, None
        try:
            micro_batches = self.micro_batches.split(batches)
            inputs = [step_input(each, step.preprocessing, self.shape) for each in micro_batches]
            normalizers = step.normalizers(inputs)
            if any((given, normalizers) not in self.gradient_graphs for given in inputs):
                before = ForwardSnapshot(step.model, step.runtime.device)  # a replay takes no more memory
            self.flat.zero_()
            terms = [self.gradient_graphs(self._of_micro_batch, (given, normalizers)) for given in inputs]
            if step.world.size > 1:
                step.world.sum(self.flat.div_(step.world.size))
            return step.joined(terms)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            require(step.world.size == 1, MEMORY_RAN_OUT)
        if before is not None:
            before.restore()
        return None

    def _of_micro_batch(self, inputs: tuple[StepInput, Tensor]) -> Terms:
        return self.step.micro_batch(*inputs)

    def _try_out(self, given: StepInput, normalizers: Tensor) -> None:
        """Capture one micro-batch's gradients, and run one eagerly beside the graph, to take the memory that both need.

        Raises torch.OutOfMemoryError where either does not fit.
        """
        for _ in range(2):
            self.gradient_graphs(self._of_micro_batch, (given, normalizers))
        if (given, normalizers) not in self.gradient_graphs:
            raise torch.OutOfMemoryError("the memory does not hold the CUDA graph of the largest batch")
        self.capturer.run(lambda: self.step.micro_batch(given, normalizers))

    def _forget(self) -> None:
        for cache in (self.gradient_graphs, self.update_graph):
            cache.forget()
        if self.step.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_up(self) -> None:
        """Run eagerly from now on, in the graphs' memory."""
        self.gave_up = True
        self.step.optimizer.zero_grad(set_to_none=True)
        del self.flat
        self._forget()
        warnings.warn("The memory ran out beside the CUDA graphs: from now on steps run uncaptured.")


def why_not_graphed(step: TrainStep) -> str | None:
    """Say why a step cannot be captured as CUDA graphs; None where it can."""
    device = step.runtime.device
    if device.type != "cuda":
        return f"CUDA graphs do not run on {device.type}"
    asked = step.criterion.selection.backend("assignment", training=True)
    if OPERATIONS["assignment"].choose(Facts(device), asked).backend == "scipy":
        return "SciPy's assignment works on the host: --kernels auto"
    if step.model.transformer.checkpoint_activations:
        return "--checkpoint-activations puts dropout's random state back, which a replay would not do"
    return None


ALIGNMENT = 128
"""In elements: 512 bytes of float32, as torch's allocator aligns."""


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Make one tensor of zeros, and set each parameter's `.grad` to a view of it, in the parameter's memory order."""
    sizes = (-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters)
    *starts, total = accumulate(sizes, initial=0)
    flat = parameters[0].new_zeros(total)
    for parameter, start in zip(parameters, starts, strict=True):
        parameter.grad = flat.as_strided(parameter.shape, parameter.stride(), start)
    return flat
