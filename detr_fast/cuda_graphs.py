"""CUDA graph capture and replay of a function of tensors: a cache of one graph per input shape.

A replay launches all kernels by one call, and nothing waits for it. The first calls of a shape run eagerly, which also
warms their kernels up; a later one is captured, which runs nothing, and replayed from there on.
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
MEMORY_IS_FULL = "The memory holds no more CUDA graphs: other shapes run eagerly from now on."
ALIGNMENT_BYTES = 512
"""The alignment of torch's allocator: Triton specialises kernels for the alignment of their pointers."""


class Capturer(Protocol):
    """Interface of what captures calls: `CudaCapturer` on a GPU, a stand-in in tests."""

    def run(self, call: Call) -> Any:
        """Run `call` once, eagerly, on the stream that captures."""
        ...

    def capture(self, call: Call) -> tuple[Callable[[], Any], Any]:
        """Capture `call` without running it; return its replay and its results.

        The results are memory that each replay overwrites, and that replays of other graphs may overwrite too.
        """
        ...

    def forget(self) -> None:
        """Make later captures independent of earlier ones, which are not replayed again."""
        ...


class CapturedGraph(NamedTuple):
    """A call captured with inputs of one shape."""

    inputs: Any
    """The memory that it reads."""
    replay: Callable[[], Any]
    results: Any
    """The memory that it writes."""


@dataclass
class GraphCache:
    """Caches one CUDA graph per input shape of a function.

    The function is passed with each call, so that its owner can hold the cache without a reference cycle.
    """

    capturer: Capturer
    max_graphs: int
    """Graphs that are captured; calls of other shapes run eagerly."""
    notice: str = ""
    """A warning for the first such call; "": none is given."""
    graphs: dict[Any, CapturedGraph] = field(default_factory=dict)
    eager_calls: Counter[Any] = field(default_factory=Counter)
    """Calls of each shape that ran eagerly so far."""
    memory: Tensor | None = None
    """Inputs of all shapes are copied into this one buffer, uint8."""

    def __post_init__(self) -> None:
        self._begins_with = self.max_graphs, self.notice

    def __call__(self, function: Callable[[Any], Any], inputs: Any, warm_up: int = 1) -> Any:
        """Return function(inputs), a tree of tensors, for a tree of tensors and None; later replays leave it as it is.

        `warm_up`: eager calls of a shape before one is captured.
        """
        shape = shape_of(inputs)
        graph = self.graphs.get(shape)
        held = self._held(inputs) if graph is None else graph.inputs
        for mine, given in zip(tree_leaves(held), tree_leaves(inputs), strict=True):
            if mine is not None:
                mine.copy_(given, non_blocking=True)
        if graph is None and self._is_due(shape, warm_up):
            graph = self._captured(shape, function, held)
        if graph is None:
            results = self.capturer.run(lambda: function(held))
            self.eager_calls[shape] += 1  # only now: what has not fitted into the memory is not to be captured
            return results
        graph.replay()
        return tree_map(torch.clone, graph.results)

    def __contains__(self, inputs: Any) -> bool:
        """Tell whether a call with `inputs` would be a replay."""
        return shape_of(inputs) in self.graphs

    def forget(self) -> None:
        """Give the memory of all graphs back, and begin anew."""
        self.graphs.clear()
        self.eager_calls.clear()
        self.memory = None
        self.max_graphs, self.notice = self._begins_with
        self.capturer.forget()

    def _is_due(self, shape: Any, warm_up: int) -> bool:
        if self.eager_calls[shape] < warm_up:
            return False
        if len(self.graphs) < self.max_graphs:
            return True
        if self.notice:
            warnings.warn(self.notice)
            self.notice = ""
        return False

    def _captured(self, shape: Any, function: Callable[[Any], Any], held: Any) -> CapturedGraph | None:
        """Capture a call; None where that does not fit into the memory, and then no more shapes are captured."""
        try:
            graph = CapturedGraph(held, *self.capturer.capture(lambda: function(held)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.max_graphs, self.notice = len(self.graphs), ""
            warnings.warn(MEMORY_IS_FULL)
            return None
        self.graphs[shape] = graph
        return graph

    def _held(self, inputs: Any) -> Any:
        """Make buffers for inputs of this shape, aligned alike in all calls, captured or not."""
        given = [leaf for leaf in tree_leaves(inputs) if leaf is not None]
        if not given:
            return inputs
        *starts, total = accumulate((-(-each.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for each in given), initial=0)
        if self.memory is None or self.memory.numel() < total:
            self.memory = given[0].new_empty(total, dtype=torch.uint8)
        views = iter([laid_out_as(each, self.memory, start) for each, start in zip(given, starts, strict=True)])
        return tree_map(lambda leaf: None if leaf is None else next(views), inputs)


def laid_out_as(tensor: Tensor, memory: Tensor, start: int) -> Tensor:
    """Make a tensor of the same shape, dtype and strides in `memory`, uint8, from byte `start` on.

    Autograd and torch.compile do not take it for a view.
    """
    strides = torch.empty_like(tensor, device="meta").stride()
    return tensor.new_empty(0).set_(memory.untyped_storage(), start // tensor.itemsize, tensor.shape, strides)


def shape_of(inputs: Any) -> Any:
    """Return the cache's key: shape and dtype of each tensor in the tree."""
    return tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in tree_leaves(inputs))


class CudaCapturer:
    """Captures CUDA graphs on a stream of its own, all with one memory pool.

    `benchmark`: cuDNN times the algorithms of each convolution in the eager calls, seconds a shape, and the capture
    takes the fastest.
    """

    def __init__(self, device: torch.device, benchmark: bool = False) -> None:
        self.stream = torch.cuda.Stream(device)
        self.benchmark = benchmark
        self.forget()

    def forget(self) -> None:
        """Take a new memory pool: that of the earlier graphs is freed with them."""
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, call: Call) -> Any:
        """Run `call` on the capturing stream, which holds cuBLAS's workspace and accumulates gradients."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), cudnn_benchmark(self.benchmark):
            results = call()
        here.wait_stream(self.stream)
        return results

    def capture(self, call: Call) -> tuple[Callable[[], Any], Any]:
        """Capture `call`. Raises UserError where the memory runs out so that CUDA cannot go on."""
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
    """Let cuDNN time which algorithm is fastest for each shape, where `wanted`, until the context ends."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
