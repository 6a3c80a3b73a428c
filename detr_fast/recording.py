"""A function of tensors as CUDA graphs: recorded once for each shape of its inputs, then replayed by one call.

A replay launches all kernels at once, and nothing waits for it. A shape's first call, or its first few, run as they
are, which is also what warms its kernels up; the next is recorded, which runs nothing, and replayed from there on.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Call = Callable[[], Any]


class Recorder(Protocol):
    """What records: CUDA graphs on a GPU."""

    def run(self, call: Call) -> Any:
        """The call as it is, once, where recordings are made too."""
        ...

    def record(self, call: Call) -> tuple[Callable[[], Any], Any]:
        """How to repeat the call, which does not run here, and its results: memory that each repetition writes anew."""
        ...


class Recording(NamedTuple):
    """A call recorded with inputs of one shape."""

    inputs: Any
    """The memory that it reads."""
    replay: Callable[[], Any]
    results: Any
    """The memory that it writes."""


@dataclass
class Recordings:
    """Of one function, by the shapes of its inputs. It comes with each call, so that it may be of what holds these."""

    recorder: Recorder
    most: int
    """Recordings that are made; calls with other shapes run as they are."""
    notice: str = ""
    """A warning for the first such call; "": none is given."""
    runs_before: int = 1
    """Calls of a shape that run as they are before the next one is recorded."""
    made: dict[Any, Recording] = field(default_factory=dict)
    seen: Counter[Any] = field(default_factory=Counter)

    def __call__(self, function: Callable[[Any], Any], inputs: Any) -> Any:
        """function(inputs), a tree of tensors and None. What a recording gives is valid until its next replay."""
        shape = tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in tree_leaves(inputs))
        if shape not in self.made:
            if not self._is_due(shape):
                results = self.recorder.run(lambda: function(inputs))
                self.seen[shape] += 1  # only now: what has not fitted into the memory is not to be recorded
                return results
            held = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, inputs)
            self.made[shape] = Recording(held, *self.recorder.record(lambda: function(held)))
        recording = self.made[shape]
        for mine, given in zip(tree_leaves(recording.inputs), tree_leaves(inputs), strict=True):
            if mine is not None:
                mine.copy_(given, non_blocking=True)
        recording.replay()
        return recording.results

    def _is_due(self, shape: Any) -> bool:
        if self.seen[shape] < self.runs_before:
            return False
        if len(self.made) < self.most:
            return True
        if self.notice:
            warnings.warn(self.notice)
            self.notice = ""
        return False


class CudaRecorder:
    """Records CUDA graphs on a stream of its own, all with one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, call: Call) -> Any:
        """On the stream that records: there lies cuBLAS's workspace, and a gradient is added up on one and the same."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            results = call()
        here.wait_stream(self.stream)
        return results

    def record(self, call: Call) -> tuple[Callable[[], Any], Any]:
        graph = torch.cuda.CUDAGraph()
        # other threads call the driver meanwhile: one pins the next batch's memory, NCCL's looks after its work
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = call()
        return graph.replay, results
