"""The choices that change no number beyond rounding, the values that are worth a try, and where they lie."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from detr_fast.model.backbone import DEPTHS
from detr_fast.runtime import choose_precision
from detr_fast.tuning import RUNTIME_SWITCHES
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.workload import WorkloadOptions


class Switch(NamedTuple):
    """A choice that changes no number beyond rounding, and the values that are worth a try."""

    name: str
    values: tuple[Any, ...]


ON_GPU = (
    Switch("capture", (True, False)),
    Switch("convolution", ("cudnn",)),
    Switch("attention", ("xformers",)),
    Switch("pixels", ("triton",)),
    Switch("compile", (True, False)),
    Switch("layer_norm", ("triton",)),
    Switch("match_cost", ("triton",)),
    Switch("set_loss", ("triton",)),
    Switch("attention", ("triton",)),
    Switch("convolution", ("triton",)),
    Switch("folded", (False,)),
    Switch("frozen", (False,)),
    Switch("channels_last", (True, False)),
)
"""Those that promise most first: not all fit into the minute before a training run."""
ON_CPU = (
    Switch("precision", ("fp32",)),
    Switch("convolution", ("ref",)),
    Switch("attention", ("ref",)),
    Switch("folded", (False,)),
    Switch("frozen", (False,)),
    Switch("channels_last", (True, False)),
    Switch("compile", (True, False)),
)
TRAINING_ONLY, INFERENCE_ONLY = ("match_cost", "set_loss", "folded"), ("frozen",)


def switches(options: WorkloadOptions) -> list[Switch]:
    """List those of the device and mode of `options` that it does not decide by name and that its model has."""
    threads = torch.get_num_threads()
    own_convolutions = options.architecture().backbone in DEPTHS
    named_kernels = options.kernels != "auto"
    without = {
        **dict.fromkeys(("pixels", "layer_norm", "match_cost", "set_loss", "frozen"), named_kernels),
        **dict.fromkeys(("convolution", "folded"), named_kernels or not own_convolutions),
        **dict.fromkeys(INFERENCE_ONLY if options.mode == "training" else TRAINING_ONLY, True),
        "attention": named_kernels or options.attention != "auto",
        "precision": options.precision != "auto",
        **{name: getattr(options, name) is not None for name in ("threads", "compile", "channels_last", "capture")},
    }
    fewer = Switch("threads", tuple(sorted({count for count in (threads // 2, 1) if 0 < count < threads})))
    there = ON_GPU if options.resolved().device == "cuda" else (fewer, *ON_CPU)
    return [switch for switch in there if not without.get(switch.name, False)]


def first_guess(options: WorkloadOptions) -> Configuration:
    """Return what runs where nothing was measured: training as it comes, inference on a GPU as CUDA graphs."""
    resolved = options.resolved()
    dtype, _ = choose_precision(resolved.precision, torch.device(resolved.device))
    names: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    replayed = resolved.device == "cuda" and resolved.mode == "inference" and not resolved.compile
    workload = replace(
        resolved,
        precision=names[dtype],
        compile=bool(resolved.compile),
        channels_last=resolved.channels_last is not False,
        capture=replayed if resolved.capture is None else resolved.capture,
    )
    return Configuration(workload)


def with_value(configuration: Configuration, switch: str, value: Any) -> Configuration:
    options = configuration.options
    if options.mode == "inference" and (switch, value) in (("compile", True), ("frozen", False)):
        configuration = replace(configuration, options=replace(options, capture=False))  # such a model is not captured
    if switch in RUNTIME_SWITCHES:
        return replace(configuration, options=replace(configuration.options, **{switch: value}))
    return replace(configuration, forms={**configuration.forms, switch: value})


def value_of(configuration: Configuration, switch: str) -> Any:
    """None: a backend's first guess."""
    if switch in RUNTIME_SWITCHES:
        return getattr(configuration.options, switch)
    return configuration.forms.get(switch)
