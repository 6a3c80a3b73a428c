"""The choices that change no number beyond rounding, the values that are worth a try, and where they lie."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from detr_kernels import OPERATIONS, Operation

from detr_fast.model.backends import backends_asked
from detr_fast.runtime import choose_precision
from detr_fast.tuning import RUNTIME_SWITCHES
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.measuring.runnable import facts_of, runnable_backends
from detr_profiling.workload import WorkloadOptions


class Switch(NamedTuple):
    """A choice that changes no number beyond rounding, and the values that are worth a try."""

    name: str
    values: tuple[Any, ...]


PROMISING = ("threads", "precision", "capture", "convolution", "attention", "preprocessing", "compile", "layer_norm")
"""Those that promise most, first: not all fit into the minute before a training run. The others follow."""


def switches(options: WorkloadOptions) -> list[Switch]:
    """List those of the device and mode of `options` that it does not decide by name and that its model has."""
    resolved, runtime, threads = options.resolved(), options.runtime, torch.get_num_threads()
    on_gpu = resolved.runtime.device == "cuda"
    fewer = tuple(sorted({count for count in (threads // 2, 1) if 0 < count < threads}))
    found: dict[str, tuple[Any, ...]] = {
        "threads": () if on_gpu else fewer,
        "precision": () if on_gpu else ("fp32",),
        "capture": (True, False) if on_gpu else (),
        "compile": (True, False),
        "channels_last": (True, False),
        "optimize": (False,) if options.mode == "inference" else (),
    }
    found |= dict.fromkeys(found.keys() & runtime.asked().keys(), ())
    asked = backends_asked(runtime.kernels, runtime.attention)
    if runtime.kernels == "auto":
        found |= {name: other_backends(operation, resolved) for name, operation in OPERATIONS.items()}
        found |= dict.fromkeys(found.keys() & asked.keys(), ())
    elif found["optimize"]:
        found["optimize"] = ()
    order = {name: index for index, name in enumerate(PROMISING)}
    names = sorted((name for name, values in found.items() if values), key=lambda name: order.get(name, len(order)))
    return [Switch(name, found[name]) for name in names]


def other_backends(operation: Operation, options: WorkloadOptions) -> tuple[str, ...]:
    """List the backends of an operation that can run for a workload and that `auto` does not take first."""
    names = runnable_backends(operation, options)
    first = operation.choose(facts_of(options)).backend if names else ""
    return tuple(name for name in names if name not in (first, "scipy"))  # scipy would wait for a GPU


def first_guess(options: WorkloadOptions) -> Configuration:
    """Return what runs where nothing was measured: training as it comes, inference on a GPU as CUDA graphs."""
    resolved = options.resolved()
    runtime = resolved.runtime
    dtype, _ = choose_precision(runtime.precision, torch.device(runtime.device))
    names: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    replayed = runtime.device == "cuda" and resolved.mode == "inference" and not runtime.compile
    workload = resolved.but(
        precision=names[dtype],
        compile=bool(runtime.compile),
        channels_last=runtime.channels_last is not False,
        capture=replayed if runtime.capture is None else runtime.capture,
    )
    return Configuration(workload)


def with_value(configuration: Configuration, switch: str, value: Any) -> Configuration:
    options = configuration.options
    if options.mode == "inference" and (switch, value) in (("compile", True), ("optimize", False)):
        configuration = replace(configuration, options=options.but(capture=False))  # such a model is not captured
    if switch in RUNTIME_SWITCHES:
        return replace(configuration, options=configuration.options.but(**{switch: value}))
    return replace(configuration, backends={**configuration.backends, switch: value})


def value_of(configuration: Configuration, switch: str) -> Any:
    """Return what a configuration has for a switch; None for an operation that runs by its first guess."""
    if switch in RUNTIME_SWITCHES:
        return getattr(configuration.options.runtime, switch)
    return configuration.backends.get(switch)
