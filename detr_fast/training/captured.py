"""The whole optimizer step as a CUDA graph: recorded once for each shape of its batches, then replayed by one call.

From the model's input to the last write of AdamW and the average, with the assignment inside: nothing is launched by
the host but the replay, and nothing waits for it. A shape's first step runs as it is, which is also what warms its
kernels up; then it is recorded, which runs nothing, and replayed from there on. All graphs share one pool of memory.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

MOST_RECORDINGS = 128
"""DETR's augmentation of COCO has about 80 shapes of batches, in steps of 64 pixels."""
Terms = dict[str, Tensor]
Compute = Callable[[list["StepInput"]], Terms]


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


@dataclass
class Recording:
    """A step recorded for inputs of one shape."""

    inputs: list[StepInput]
    """The memory that it reads."""
    replay: Callable[[], Any]
    terms: Terms
    """The memory that it writes; valid until the next replay."""

    def __call__(self, inputs: list[StepInput]) -> Terms:
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if mine is not None:
                mine.copy_(given, non_blocking=True)
        self.replay()
        return self.terms


Record = Callable[[Callable[[], Terms]], tuple[Callable[[], Any], Terms]]
"""Records a call without running it: how to run it, and where its results will be."""


@dataclass
class CapturedStep:
    """`compute`, recorded for each shape of its inputs after it has run for it once."""

    compute: Compute
    record: Record
    recordings: dict[Any, Recording] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)
    warned: bool = False

    def __call__(self, inputs: list[StepInput]) -> Terms:
        shape = tuple(None if leaf is None else leaf.shape for leaf in tree_leaves(inputs))
        if shape not in self.seen:
            self.seen.add(shape)
            return self.compute(inputs)
        if shape not in self.recordings and len(self.recordings) == MOST_RECORDINGS:
            if not self.warned:
                warnings.warn(
                    f"{MOST_RECORDINGS} shapes of batches are recorded: steps of other shapes run as they are."
                )
            self.warned = True
            return self.compute(inputs)
        if shape not in self.recordings:
            held = tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, inputs)
            self.recordings[shape] = Recording(held, *self.record(lambda: self.compute(held)))
        return self.recordings[shape](inputs)


class CudaRecorder:
    """Records CUDA graphs on a stream of its own, all with one pool of memory."""

    def __init__(self, device: torch.device, before: Callable[[], None]) -> None:
        """`before` is called before each recording: gradients are to be new memory, the graph's own."""
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.before = before

    def __call__(self, compute: Callable[[], Terms]) -> tuple[Callable[[], Any], Terms]:
        self.before()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            terms = compute()
        return graph.replay, terms

    def aside(self, compute: Compute) -> Compute:
        """`compute` on the stream that records: a parameter's gradient is always made on one and the same."""

        def run(inputs: list[StepInput]) -> Terms:
            if torch.cuda.is_current_stream_capturing():
                return compute(inputs)
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                terms = compute(inputs)
            here.wait_stream(self.stream)
            return terms

        return run
