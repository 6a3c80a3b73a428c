"""What captures where there is no GPU."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from detr_fast.cuda_graphs import Call


class StandIn:
    """Runs a captured call at each replay, from the same memory into the same memory, as a CUDA graph does.

    Others' results are lost then: the memory of CUDA graphs that share a pool overlaps.
    """

    def __init__(self) -> None:
        self.ran = self.captured = self.replayed = self.forgotten = 0
        self.results: list[dict[str, Tensor]] = []

    def run(self, call: Call) -> Any:
        self.ran += 1
        return call()

    def capture(self, call: Call) -> tuple[Callable[[], Any], dict[str, Tensor]]:
        self.captured += 1
        results: dict[str, Tensor] = {}
        self.results.append(results)

        def replay() -> None:
            self.replayed += 1
            for other in self.results:
                for value in other.values():
                    value.fill_(float("nan"))
            for name, value in call().items():
                results.setdefault(name, value.detach().clone()).copy_(value)

        return replay, results

    def forget(self) -> None:
        self.forgotten += 1
