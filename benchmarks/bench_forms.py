"""What each kernel is worth inside a whole training step: `pytest benchmarks/bench_forms.py --benchmark-only`.

DETR-R50 on photographs that have to be resized, all operations in their plain form but one, eager, on a GPU also
captured, where the host's launches do not hide what a kernel saves, and with --size full compiled. A form that loses
here is not the default, whatever it wins alone. On a CPU, where Triton does not run, what can be changed there, one
after another, from all that is on by default.
"""

from typing import Any

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

ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "xformers": {"attention": "xformers"},
    "triton-attention": {"attention": "triton"},
    "triton-convolution": {"convolution": "triton"},
    "cudnn-convolution": {"convolution": "cudnn"},
    "triton-layer-norm": {"layer_norm": "triton"},
    "triton-preprocessing": {"preprocessing": "triton"},
    "triton-match-cost": {"match_cost": "triton"},
    "triton-set-loss": {"set_loss": "triton"},
    "scipy": {"assignment": "scipy"},
}
OURS = dict.fromkeys(("layer_norm", "preprocessing", "match_cost", "set_loss"), "triton")
ALL = OURS | {"attention": "xformers", "convolution": "cudnn"}
PLAIN = dict.fromkeys((*OURS, "convolution"), "ref")
"""On a GPU, whatever `auto` has come to mean there; matching is on the device."""
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ref-attention": {"attention": "ref"},
    "unfolded": {"frozen_batch_norm": "ref"},
}
if ON_GPU:
    FORMS = {name: PLAIN | form for name, form in (FORMS | ONE_BY_ONE | {"all": ALL}).items()}
else:
    FORMS |= {
        "ref-convolution": {"convolution": "ref"},
        "block-by-block": {"residual_stage": "ref"},
        "sdpa": {"attention": "sdpa"},
        "ref-dropout": {"dropout": "ref"},
    }


def cases(size: Size) -> list[WorkloadCase]:
    options = workload_options("training", size, attention="sdpa")
    forms: dict[str, dict[str, Any]] = {name: {"forms": form} for name, form in FORMS.items()}
    if ON_GPU:
        forms |= {f"{name}-captured": form | {"capture": True} for name, form in forms.items() if name != "scipy"}
    return list(own_cases(options, forms, precisions()[-1:], compiles(size) and size == "full"))


def bench_form(benchmark: BenchmarkFixture, case: WorkloadCase, plain: PlainObservations) -> None:
    time_workload(benchmark, case, plain)
