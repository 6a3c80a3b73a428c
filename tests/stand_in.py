"""What records where there is no GPU."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from detr_fast.recording import Call


class StandIn:
    """Runs a recorded call at each replay, from the same memory into the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        self.ran = self.recorded = self.replayed = 0

    def run(self, call: Call) -> Any:
        self.ran += 1
        return call()

    def record(self, call: Call) -> tuple[Callable[[], Any], dict[str, Tensor]]:
        self.recorded += 1
        results: dict[str, Tensor] = {}

        def replay() -> None:
            self.replayed += 1
            for name, value in call().items():
                results.setdefault(name, value.detach().clone()).copy_(value)

        return replay, results
