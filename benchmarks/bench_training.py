"""A training step, from uint8 photographs on the host to the optimizer's last write: `pytest
benchmarks/bench_training.py --benchmark-only`.

Ours with several options, and the plain reference, Hugging Face's DETR and Faster R-CNN on the same photographs, which
all of them resize on the device, each with its own loss; and `tiny`, the step of `make train`:
detr_tiny on 16 images of 64 pixels.
"""

from detr_profiling.workload import WorkloadOptions
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clock import Size
from benchmarks.gate import PlainObservations
from benchmarks.workload_cases import (
    OWN_OPTIONS,
    WorkloadCase,
    baseline_cases,
    compiles,
    own_cases,
    precisions,
    time_workload,
    workload_options,
)
from detr_fast.runtime import missing_for_compile

TINY = WorkloadOptions.of(model="detr_tiny", size="64x64", batch_size=16, objects=5)


def cases(size: Size) -> list[WorkloadCase]:
    options = workload_options("training", size)
    own = own_cases(options, OWN_OPTIONS, precisions(), compiles(size))
    tiny = own_cases(TINY, {"tiny": {}}, precisions(), missing_for_compile() is None)
    return [*baseline_cases(options, size), *own, *tiny]


def bench_training(benchmark: BenchmarkFixture, case: WorkloadCase, plain: PlainObservations) -> None:
    time_workload(benchmark, case, plain)
