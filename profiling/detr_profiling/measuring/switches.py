"""The choices that change no number beyond rounding, the values that are worth a try, and where they lie."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from detr_kernels.dispatch import why_not_triton

from detr_fast.model.backbone import DEPTHS
from detr_fast.runtime import choose_precision, missing_for_compile
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
    Switch("folded", (False,)),
    Switch("frozen", (False,)),
    Switch("channels_last", (True, False)),
    Switch("compile", (True, False)),
)
TRAINING_ONLY, INFERENCE_ONLY = ("match_cost", "set_loss", "folded"), ("frozen",)


def switches(options: WorkloadOptions) -> list[Switch]:
    """Those of the device and mode of `options` that it does not decide by name and that its model has."""
    cores = torch.get_num_threads()
    own_convolutions = options.architecture().backbone in DEPTHS
    without = {
        "attention": options.attention != "auto",
        "precision": options.precision != "auto",
        "threads": options.threads is not None,
        "convolution": not own_convolutions,
        "folded": not own_convolutions,
        **dict.fromkeys(INFERENCE_ONLY if options.mode == "training" else TRAINING_ONLY, True),
    }
    fewer = Switch("threads", tuple(sorted({count for count in (cores // 2, 1) if 0 < count < cores})))
    there = ON_GPU if options.resolved().device == "cuda" else (fewer, *ON_CPU)
    return [switch for switch in there if not without.get(switch.name, False)]


def first_guess(options: WorkloadOptions) -> Configuration:
    """What runs where nothing was measured: training as it comes, optimised inference on a GPU as CUDA graphs."""
    resolved = options.resolved()
    dtype, _ = choose_precision(resolved.precision, torch.device(resolved.device))
    names: dict[torch.dtype, Any] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    replayed = resolved.device == "cuda" and resolved.mode == "inference"
    return Configuration(replace(resolved, precision=names[dtype], capture=resolved.capture or replayed))


def with_value(configuration: Configuration, switch: str, value: Any) -> Configuration:
    if switch in RUNTIME_SWITCHES:
        return replace(configuration, options=replace(configuration.options, **{switch: value}))
    return replace(configuration, forms={**configuration.forms, switch: value})


def value_of(configuration: Configuration, switch: str) -> Any:
    """None: a backend's first guess."""
    if switch in RUNTIME_SWITCHES:
        return getattr(configuration.options, switch)
    return configuration.forms.get(switch)


def why_not_tried(switch: str, value: Any, device: torch.device) -> str | None:
    """Why a candidate cannot run, as far as that is known before it is started; None where nothing is known."""
    if value == "triton":
        return why_not_triton(device)
    return missing_for_compile() if (switch, value) == ("compile", True) else None
