"""The techniques between the plain reference and the fast path, in the order in which they are added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detr_kernels import why_not_xformers
from detr_kernels.dispatch import why_not_triton

from detr_fast.runtime import choose_device, choose_precision, missing_for_compile
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.workload import WorkloadOptions

PLAIN_FORMS = {
    "attention": "ref",
    "convolution": "ref",
    "folded": False,
    "frozen": False,
    "layer_norm": "ref",
    "pixels": "ref",
    "match_cost": "ref",
    "assignment": "scipy",
    "set_loss": "ref",
}
"""Every operation as the reference does it."""
FUSED_FORMS = dict.fromkeys(("convolution", "layer_norm", "pixels", "match_cost", "set_loss"), "triton")


@dataclass(frozen=True)
class Technique:
    """What it changes of a configuration."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of it."""

    def applied(self, to: Configuration) -> Configuration:
        return replace(
            to, options=replace(to.options, **self.options), forms={**to.forms, **self.forms}, **self.settings
        )


def start(options: WorkloadOptions) -> Configuration:
    """The reference as it comes: eager, float32 in full, NCHW, images batched at random."""
    forms: dict[str, Any] = {"channels_last": False, "kernels": "ref", "attention": "ref", "compile": False}
    return Configuration(
        replace(options, precision="fp32", buckets=False, **forms), "reference", tf32=False, keeps_memory=False
    )


def techniques(top: WorkloadOptions) -> list[Technique]:
    """Those that `top` asks for, the configuration that the ladder ends at, and that run on its device.

    There `auto` means all that there is. Raises UserError where something asked for by name is not there.
    """
    return list(_techniques(top))


def _techniques(top: WorkloadOptions) -> Iterator[Technique]:
    device, _ = choose_device(top.device)
    on_gpu = device.type == "cuda"
    dtype, _ = choose_precision(top.precision, device)
    if top.sizes == "mixed" and top.buckets:
        yield Technique("buckets", options={"buckets": True})
    if on_gpu:
        yield Technique("TF32", settings={"tf32": True})
    else:
        yield Technique("freed memory kept", settings={"keeps_memory": True})
    yield Technique("losses at once", forms=PLAIN_FORMS, settings={"implementation": "detr_fast"})
    if dtype.itemsize == 2:
        precision = "bf16" if top.precision == "auto" else top.precision
        yield Technique(precision, options={"precision": precision})
    if top.channels_last:
        yield Technique("channels-last", options={"channels_last": True})
    if top.attention != "ref":
        yield Technique("SDPA", forms={"attention": "sdpa"})
    if top.kernels != "ref":
        yield Technique("folded batch norm", forms={"folded": True, "convolution": "auto"})
        if top.mode == "inference":
            yield Technique("frozen weights", forms={"frozen": True})
    if on_gpu:
        yield from _gpu_techniques(top, dtype.itemsize == 2)
    if top.compile and missing_for_compile() is None:
        yield Technique("compile", options={"compile": True})
    if on_gpu and top.kernels != "ref":
        if top.mode == "training":
            yield Technique("captured step", options={"capture": True})
        elif not top.compile:
            yield Technique("captured inference", options={"capture": True})


def _gpu_techniques(top: WorkloadOptions, half_precision: bool) -> Iterator[Technique]:
    device, _ = choose_device(top.device)
    if top.attention in ("auto", "xformers") and half_precision and why_not_xformers() is None:
        yield Technique("packed attention", forms={"attention": "xformers"})
    if top.attention == "triton":
        yield Technique("packed attention", forms={"attention": "triton"})
    if top.kernels != "ref" and why_not_triton(device) is None:
        yield Technique("fused kernels", forms=FUSED_FORMS)
        yield Technique("matching on the device", forms={"assignment": "triton"})
