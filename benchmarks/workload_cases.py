"""Whole models as cases: ours with several options, and our baselines on the same weights and the same batch."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.workload import Mode, Workload, WorkloadOptions
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.clock import DEVICE, Size, time_case
from benchmarks.gate import PlainObservations
from detr_fast.runtime import missing_for_compile, multiplies_bf16

ON_GPU = DEVICE.type == "cuda"
SIZES: dict[tuple[Mode, Size], tuple[str, int]] = (
    {
        ("inference", "small"): ("800x1066", 8),
        ("inference", "full"): ("800x1066", 16),
        ("training", "small"): ("800x1066", 8),
        ("training", "full"): ("800x1066", 16),
    }
    if ON_GPU
    else {
        ("inference", "small"): ("320x427", 1),
        ("inference", "full"): ("800x1066", 2),
        ("training", "small"): ("224x320", 1),
        ("training", "full"): ("800x1066", 2),
    }
)
"""Height and width in pixels, and images."""
OWN_OPTIONS: dict[str, dict[str, Any]] = {"ref": {"kernels": "ref"}, "auto": {}}
"""Options of ours: DETR's own sequence of operations; the default; on a GPU also every kernel of ours, and the default
as a CUDA graph."""
if ON_GPU:
    OWN_OPTIONS |= {"triton": {"kernels": "triton"}, "captured": {"capture": True}}


@dataclass(frozen=True)
class WorkloadCase:
    """A training step or an inference."""

    name: str
    configuration: Configuration

    @property
    def precision(self) -> str:
        """Name the precision; tf32 is float32 as Tensor Cores multiply it."""
        precision = self.configuration.options.runtime.precision
        return "tf32" if ON_GPU and precision == "fp32" and self.configuration.tf32 else precision

    @property
    def size(self) -> str:
        return self.configuration.options.size

    @property
    def images(self) -> int:
        return self.configuration.options.batch_size or 1

    @property
    def group(self) -> str:
        options = self.configuration.options
        return f"{options.mode}, {options.network.model}, {self.size}, b{self.images}"


def precisions() -> Sequence[str]:
    """List those that the device is made for, the fastest last."""
    exact = "tf32" if ON_GPU else "fp32"
    return (exact, "bf16") if multiplies_bf16(DEVICE) else (exact,)


def compiles(size: Size) -> bool:
    """Tell whether to time compiled models: for a CPU, compiling a ResNet-50 detector takes minutes."""
    return missing_for_compile() is None and (ON_GPU or size == "full")


def workload_options(mode: Mode, size: Size, **changes: Any) -> WorkloadOptions:
    height_width, images = SIZES[mode, size]
    return WorkloadOptions.of(mode=mode, size=height_width, batch_size=images, **changes)


def case(name: str, options: WorkloadOptions, precision: str, **changes: Any) -> WorkloadCase:
    """Make a case; `changes`: other fields of Configuration."""
    options = options.but(precision="bf16" if precision == "bf16" else "fp32")
    return WorkloadCase(name, Configuration(options, tf32=precision != "fp32", **changes))


def baseline_cases(options: WorkloadOptions, size: Size) -> Iterator[WorkloadCase]:
    """Yield the plain reference, Hugging Face's DETR and Faster R-CNN; on a GPU the reference in full float32 too."""
    if ON_GPU:
        yield case("reference", options, "fp32", implementation="reference")
    for precision in precisions():
        for baseline in ("reference", "hf-eager", "hf-sdpa"):
            yield case(baseline, options, precision, implementation=baseline)
    if compiles(size):
        yield case("hf-compiled", options, precisions()[-1], implementation="hf-compiled")
    yield case("fasterrcnn", options, precisions()[0], implementation="fasterrcnn")


def own_cases(
    options: WorkloadOptions, changes: Mapping[str, Mapping[str, Any]], in_precisions: Sequence[str], compiled: bool
) -> Iterator[WorkloadCase]:
    """Yield ours by name with each of `changes` of the options, in each precision; under `backends` a change holds
    those of single operations.

    With `compiled`, each but the plain `ref` also compiled, in the last of the precisions; a compiled inference cannot
    be captured.
    """
    for name, change in changes.items():
        changed = options.but(**{key: value for key, value in change.items() if key != "backends"})
        backends = change.get("backends", {})
        for precision in in_precisions:
            yield case(name, changed, precision, backends=backends)
        if compiled and name != "ref" and not (options.mode == "inference" and changed.runtime.capture):
            yield case(f"{name}-compiled", changed.but(compile=True), in_precisions[-1], backends=backends)


def time_workload(benchmark: BenchmarkFixture, case: WorkloadCase, plain: PlainObservations) -> None:
    """Pass the gate, then time."""
    workload, compile_s = case.configuration.build(), None
    if workload.options.runtime.compile:
        compile_s = time_first_run(workload)
    verdict = plain.judge(workload, case.configuration.tf32)
    # judged was a graph without dropout, or of fewer images, whose number must not become a variable of the timed one
    torch._dynamo.reset()
    time_case(benchmark, case, verdict, workload.run, workload.device, compile_s)


def time_first_run(workload: Workload) -> float:
    """Time the run that compiles, in seconds, fewer where inductor's cache holds the graph; the weights stay."""
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    began = time.perf_counter()
    workload.run()
    workload.synchronize()
    seconds = time.perf_counter() - began
    workload.model.load_state_dict(before)
    return seconds
