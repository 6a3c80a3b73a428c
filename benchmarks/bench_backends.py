"""Time that each backend saves in a whole training step: `pytest benchmarks/bench_backends.py --benchmark-only`.

DETR-R50 on photographs that have to be resized. On a GPU all operations run by their reference but one, eager, and also
captured, where the host's launches do not hide what a kernel saves; with --size full compiled too. On a CPU all run as
they do by default but one. A backend that loses here is not the default, whatever it wins alone.
"""

from typing import Any

from detr_kernels import OPERATIONS
from detr_profiling.measuring.runnable import runnable_backends
from detr_profiling.measuring.switches import other_backends
from detr_profiling.workload import WorkloadOptions
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clock import Size
from benchmarks.gate import PlainObservations
from benchmarks.workload_cases import (
    ON_GPU,
    WorkloadCase,
    compiles,
    own_cases,
    precisions,
    time_workload,
    workload_options,
)

Backends = dict[str, str]
"""Operation -> backend."""


def changed_by_one(options: WorkloadOptions) -> dict[str, Backends]:
    """Name the selections that differ from `default` in the backend of one operation."""
    found: dict[str, Backends] = {"default": {}}
    for name, operation in OPERATIONS.items():
        for backend in other_backends(operation, options):
            found[case_name(name, backend)] = {name: backend}
    return found


def one_by_one(options: WorkloadOptions) -> dict[str, Backends]:
    """Name the selections that differ from `plain`, all references, in the backend of one operation; and `all`, the
    first that can run of every operation. Matching stays on the device but where SciPy is named."""
    runnable = {name: names for name, each in OPERATIONS.items() if (names := runnable_backends(each, options))}
    plain = {name: OPERATIONS[name].reference for name in runnable} | {"assignment": runnable["assignment"][0]}
    found = {"plain": plain}
    for name, backends in runnable.items():
        for backend in backends:
            if backend != plain[name]:
                found[case_name(name, backend)] = plain | {name: backend}
    return found | {"all": {name: backends[0] for name, backends in runnable.items()}}


def case_name(operation: str, backend: str) -> str:
    return f"{operation.replace('_', '-')}-{backend}"


def cases(size: Size) -> list[WorkloadCase]:
    options = workload_options("training", size)
    selections = one_by_one(options) if ON_GPU else changed_by_one(options)
    changes: dict[str, dict[str, Any]] = {name: {"backends": backends} for name, backends in selections.items()}
    if ON_GPU:
        can = {name: each for name, each in changes.items() if not name.endswith("scipy")}
        changes |= {f"{name}-captured": each | {"capture": True} for name, each in can.items()}
    return list(own_cases(options, changes, precisions()[-1:], compiles(size) and size == "full"))


def bench_backend(benchmark: BenchmarkFixture, case: WorkloadCase, plain: PlainObservations) -> None:
    time_workload(benchmark, case, plain)
