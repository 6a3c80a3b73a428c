"""Names of all benchmarks, the number of their rounds, and the facts that are written beside their times."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from detr_profiling.measuring.memory import peak_memory
from detr_profiling.measuring.timing import STEADY_AFTER, calls_a_run, measure
from pytest_benchmark.fixture import BenchmarkFixture

Size = Literal["small", "full"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEAST_ROUNDS, MOST_ROUNDS = (10, 200) if DEVICE.type == "cuda" else (5, 50)
ENOUGH_S = 1.0
"""Seconds that all rounds of a benchmark should take: below this, it runs more rounds than `LEAST_ROUNDS`."""


class Case(Protocol):
    """Describes one benchmark. Its id is `NAME-PRECISION-SIZE-bIMAGES`, as in triton-bf16-800x1066-b2."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def size(self) -> str:
        """Give HEIGHTxWIDTH of images in pixels, or of what a kernel works on."""
        ...

    @property
    def images(self) -> int: ...
    @property
    def group(self) -> str:
        """Name the table of this case; those of one group do the same work."""
        ...


def case_id(case: Case) -> str:
    return f"{case.name}-{case.precision}-{case.size}-b{case.images}"


@dataclass(frozen=True)
class Verdict:
    """Holds what the gate found before the clock may start: of all quantities the one nearest to what is allowed."""

    quantity: str
    error: float | None = None
    allowed: float | None = None


NOT_COMPARABLE = Verdict("none: it is another function")


def time_case(
    benchmark: BenchmarkFixture,
    case: Case,
    verdict: Verdict,
    run: Callable[[], Any],
    device: torch.device = DEVICE,
    compile_s: float | None = None,
) -> None:
    """Time `run` to the end of its work on `device`.

    On a GPU a round is several calls issued back to back, and its time is that of one call. `compile_s`: seconds of
    the run that compiled it. On a CPU `peak_mib` is the whole process's resident set, with what earlier benchmarks
    have left in it.
    """

    rounds, calls = choose_rounds(run, device) if benchmark.enabled else (1, 1)
    issued = itertools.count(1)

    def issue() -> None:
        run()
        if next(issued) % calls == 0:
            synchronize(device)

    benchmark.group = case.group
    with peak_memory(device) as peak:
        benchmark.pedantic(issue, rounds=rounds, iterations=calls)
    benchmark.extra_info |= {
        "images": case.images,
        "size": case.size,
        "precision": case.precision,
        "quantity": verdict.quantity,
        "error": verdict.error,
        "allowed": verdict.allowed,
        "peak_mib": None if math.isnan(peak.mib) else peak.mib,
        "compile_s": compile_s,
        "calls_a_round": calls,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if benchmark.stats:
        benchmark.extra_info["images_per_second"] = case.images / benchmark.stats.stats.median


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def choose_rounds(run: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Choose rounds, as many as take `ENOUGH_S` within bounds, and the calls of each, after warm-up calls."""
    steady = measure(run, lambda: synchronize(device), rounds=1, warmup=STEADY_AFTER[device.type] - 1)
    calls = calls_a_run(device.type, steady.median_ms)
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(1e3 * ENOUGH_S / (calls * steady.median_ms)))), calls
