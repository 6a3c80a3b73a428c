"""Inference, from uint8 photographs on the host to boxes in pixels.

Run it by `pytest benchmarks/bench_inference.py --benchmark-only`.

Ours with several options, and the plain reference, Hugging Face's DETR and Faster R-CNN on the same photographs, which
all of them resize on the device.
"""

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


def cases(size: Size) -> list[WorkloadCase]:
    options = workload_options("inference", size)
    return [*baseline_cases(options, size), *own_cases(options, OWN_OPTIONS, precisions(), compiles(size))]


def bench_inference(benchmark: BenchmarkFixture, case: WorkloadCase, plain: PlainObservations) -> None:
    time_workload(benchmark, case, plain)
