"""CUDA graph capture of a function of tensors: one graph for each shape of its inputs, replayed by one call.

A replay launches all kernels at once, and nothing waits for it. A shape's first calls run uncaptured, which also warms
its kernels up; a later one is captured, which runs nothing, and replayed from there on.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from detr_fast.config import UserError
from detr_fast.out_of_memory import is_out_of_memory

Call = Callable[[], Any]
NO_ROOM = "The memory has no room for more CUDA graphs: other shapes run uncaptured from now on."
ALIGNMENT_BYTES = 512
"""As torch's allocator aligns: kernels are specialised for what their pointers are multiples of."""


class Recorder(Protocol):
    """What captures: CUDA graphs on a GPU."""

    def run(self, call: Call) -> Any:
        """Calls it once, uncaptured, where captures are made too."""
        ...

    def record(self, call: Call) -> tuple[Callable[[], Any], Any]:
        """Returns how to repeat the call, which does not run here, and its results: memory that each replay writes
        anew, and that replays of other calls may write too."""
        ...

    def forget(self) -> None:
        """Makes later captures independent of earlier ones, which are not replayed again."""
        ...


class Recording(NamedTuple):
    """A call captured with inputs of one shape."""

    inputs: Any
    """The memory that it reads."""
    replay: Callable[[], Any]
    results: Any
    """The memory that it writes."""


@dataclass
class Recordings:
    """The graph cache of one function, by the shapes of its inputs. The function comes with each call, so that it may
    belong to what holds the cache."""

    recorder: Recorder
    most: int
    """Graphs that are captured; calls with other shapes run uncaptured."""
    notice: str = ""
    """A warning for the first such call; "": none is given."""
    made: dict[Any, Recording] = field(default_factory=dict)
    seen: Counter[Any] = field(default_factory=Counter)
    memory: Tensor | None = None
    """What inputs are copied into, those of all shapes into the same."""

    def __post_init__(self) -> None:
        self._begins_with = self.most, self.notice

    def __call__(self, function: Callable[[Any], Any], inputs: Any, uncaptured: int = 1) -> Any:
        """Returns function(inputs), a tree of tensors, for a tree of tensors and None; replays do not change it later.

        `uncaptured`: how many calls of a shape run before one is captured.
        """
        shape = shape_of(inputs)
        recording = self.made.get(shape)
        held = self._held(inputs) if recording is None else recording.inputs
        for mine, given in zip(tree_leaves(held), tree_leaves(inputs), strict=True):
            if mine is not None:
                mine.copy_(given, non_blocking=True)
        if recording is None and self._is_due(shape, uncaptured):
            recording = self._captured(shape, function, held)
        if recording is None:
            results = self.recorder.run(lambda: function(held))
            self.seen[shape] += 1  # only now: what has not fitted into the memory is not to be captured
            return results
        recording.replay()
        return tree_map(torch.clone, recording.results)

    def __contains__(self, inputs: Any) -> bool:
        """Tell whether a call with `inputs` is a replay."""
        return shape_of(inputs) in self.made

    def forget(self) -> None:
        """Gives the memory of all graphs back, and begins anew."""
        self.made.clear()
        self.seen.clear()
        self.memory = None
        self.most, self.notice = self._begins_with
        self.recorder.forget()

    def _is_due(self, shape: Any, uncaptured: int) -> bool:
        if self.seen[shape] < uncaptured:
            return False
        if len(self.made) < self.most:
            return True
        if self.notice:
            warnings.warn(self.notice)
            self.notice = ""
        return False

    def _captured(self, shape: Any, function: Callable[[Any], Any], held: Any) -> Recording | None:
        """Capture a call; None where that does not fit into the memory, and then no more shapes are captured."""
        try:
            recording = Recording(held, *self.recorder.record(lambda: function(held)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.most, self.notice = len(self.made), ""
            warnings.warn(NO_ROOM)
            return None
        self.made[shape] = recording
        return recording

    def _held(self, inputs: Any) -> Any:
        """Memory for inputs of this shape, aligned alike in all calls, captured or not."""
        given = [leaf for leaf in tree_leaves(inputs) if leaf is not None]
        if not given:
            return inputs
        *starts, total = accumulate((-(-each.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for each in given), initial=0)
        if self.memory is None or self.memory.numel() < total:
            self.memory = given[0].new_empty(total, dtype=torch.uint8)
        views = iter([laid_out_as(each, self.memory, start) for each, start in zip(given, starts, strict=True)])
        return tree_map(lambda leaf: None if leaf is None else next(views), inputs)


def laid_out_as(tensor: Tensor, memory: Tensor, start: int) -> Tensor:
    """Makes a tensor of the same shape, dtype and strides in `memory`, uint8, from byte `start` on. To autograd and
    torch.compile it is no view of anything."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return tensor.new_empty(0).set_(memory.untyped_storage(), start // tensor.itemsize, tensor.shape, strides)


def shape_of(inputs: Any) -> Any:
    """Returns what decides which graph is replayed: shape and dtype of each tensor in the tree."""
    return tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in tree_leaves(inputs))


class CudaRecorder:
    """Captures CUDA graphs on a stream of its own, all with one pool of memory.

    `benchmark`: cuDNN measures the algorithms of each convolution in the uncaptured call, seconds a shape, and the
    capture takes the fastest.
    """

    def __init__(self, device: torch.device, benchmark: bool = False) -> None:
        self.stream = torch.cuda.Stream(device)
        self.benchmark = benchmark
        self.forget()

    def forget(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, call: Call) -> Any:
        """On the stream that captures: there lies cuBLAS's workspace, and a gradient is added up on one and the
        same."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), cudnn_benchmark(self.benchmark):
            results = call()
        here.wait_stream(self.stream)
        return results

    def record(self, call: Call) -> tuple[Callable[[], Any], Any]:
        """Raises UserError where the memory runs out in a way that leaves nothing to go on with."""
        graph = torch.cuda.CUDAGraph()
        # other threads call the driver meanwhile: one pins the next batch's memory, NCCL's looks after its work
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with cudnn_benchmark(self.benchmark), capture:
                results = call()
        except RuntimeError as error:
            if not is_out_of_memory(error) and is_out_of_memory(error.__context__):
                raise UserError(
                    "The memory ran out while a CUDA graph was captured. Give a smaller --batch-size; a training run "
                    "goes on from its last checkpoint with --resume auto."
                ) from error
            raise
        return graph.replay, results


@contextmanager
def cudnn_benchmark(wanted: bool) -> Iterator[None]:
    """Lets cuDNN measure which algorithm is fastest for each shape, where `wanted`; afterwards as before."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
