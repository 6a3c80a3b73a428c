"""Constants that are computed once for all later calls, and when that is allowed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def may_be_cached(*tensors: Tensor) -> bool:
    """Tell whether results that are computed here from `tensors`, or are `tensors`, may be cached for later calls.

    A traced function has no memory. A fake tensor has no data. The memory of a CUDA graph that is being captured is
    written anew by each replay, and an inference tensor cannot be used in training.
    """
    if torch.compiler.is_compiling():  # first: the questions below are none that Dynamo could answer
        return False
    if any(_kind(each) is not Tensor or each.is_inference() for each in tensors):
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _kind(tensor: Tensor) -> type[Tensor]:
    return Tensor if type(tensor) is nn.Parameter else type(tensor)


class Cached:
    """Caches the results of a function of tensors, and computes them again only where one of these has changed.

    A change is seen by the tensor's version, which neither a write through `.data` nor the replay of a CUDA graph
    raises: such writes to sources go unnoticed. New results of the same shapes are written over the old ones, so that
    a captured CUDA graph, which reads the old ones' memory, reads them. Copied or pickled, it is empty.
    """

    def __init__(self) -> None:
        self.sources: Sequence[Tensor] = ()
        self.state: list[Any] = []
        self.results: list[Tensor] = []
        self.compute: Callable[[], Sequence[Tensor]] = list

    def __reduce__(self) -> tuple[type["Cached"], tuple[()]]:
        return Cached, ()

    def __call__(self, sources: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return compute(), a function of `sources` alone, without gradient: its latest results, if nothing changed."""
        if torch.compiler.is_compiling() or any(each.is_inference() for each in sources):
            return compute()
        state = [(id(each), each._version, each.dtype, each.device) for each in sources]
        if self.results and state == self.state:
            return self.results
        with torch.no_grad():
            results = compute()
        fake = all(type(each) is FakeTensor for each in (*sources, *results))  # as fake as the module is
        if not (fake or may_be_cached(*sources, *results)):
            return results
        self._keep(results)
        self.sources, self.state = sources, state  # the sources too: an id is one tensor's only while that lives
        self.compute = compute
        return self.results

    def refresh(self) -> None:
        """Compute anew, in the same memory, if the sources have changed since the last call."""
        if self.results:
            self(self.sources, self.compute)

    def _keep(self, results: Sequence[Tensor]) -> None:
        old = [(each.shape, each.stride(), each.dtype, each.device) for each in self.results]
        if old != [(each.shape, each.stride(), each.dtype, each.device) for each in results]:
            self.results = list(results)
            return
        with torch.no_grad():
            for mine, new in zip(self.results, results, strict=True):
                mine.copy_(new)
