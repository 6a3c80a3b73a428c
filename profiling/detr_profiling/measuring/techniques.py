"""The techniques between the plain reference and the fast path, in the order in which they are added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from detr_kernels import choose_convolution, why_not_xformers
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
KERNELS = {"layer_norm": "layer norm", "pixels": "pixels"}
"""Fields of Implementation whose kernel is ours, and their names, in training and in inference."""
LOSS_KERNELS = {"match_cost": "match cost", "set_loss": "set loss", "assignment": "assignment"}
"""The same of training alone."""


@dataclass(frozen=True)
class Technique:
    """What it changes of a configuration."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of it."""

    @property
    def can_be_left_out(self) -> bool:
        """Whether the techniques after it mean the same without it."""
        return not self.settings and not {"precision", "channels_last", "buckets"} & self.options.keys()

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
        # on a CPU the same choice is our own attention, which draws dropout's mask itself
        dropped = not on_gpu and top.mode == "training" and top.architecture().dropout > 0
        yield Technique("attention with dropout" if dropped else "SDPA", forms={"attention": "sdpa"})
    if top.kernels != "ref":
        yield Technique("folded batch norm", forms={"folded": True})
        if not on_gpu and choose_convolution(3, device)[0] == "onednn":
            yield Technique("convolutions by oneDNN", forms={"convolution": "auto"})  # whole stages of them, too
        if top.mode == "inference":
            yield Technique("frozen weights", forms={"frozen": True})
    if on_gpu:
        yield from _gpu_techniques(top, device, dtype.itemsize == 2)
    if top.compile and missing_for_compile() is None:
        yield Technique("compile", options={"compile": True})
    if on_gpu and top.kernels != "ref":
        if top.mode == "training":
            yield Technique("captured step", options={"capture": True})
        elif not top.compile:
            yield Technique("captured inference", options={"capture": True})


def _gpu_techniques(top: WorkloadOptions, device: torch.device, half_precision: bool) -> Iterator[Technique]:
    """A row for each kernel, so that none hides behind another. Of two that do the same work the later one stays on:
    the one that is expected to win."""
    has_triton = why_not_triton(device) is None
    if top.attention == "triton" or (top.attention == "auto" and top.kernels != "ref" and has_triton):
        yield Technique("packed attention by triton", forms={"attention": "triton"})
    wanted = top.attention == "xformers" or (top.attention == "auto" and top.kernels != "triton")
    if wanted and half_precision and why_not_xformers() is None:
        yield Technique("packed attention by xformers", forms={"attention": "xformers"})
    if top.kernels == "ref":
        return
    if has_triton:
        for name, title in (KERNELS | (LOSS_KERNELS if top.mode == "training" else {})).items():
            yield Technique(f"{title} by triton", forms={name: "triton"})
        yield Technique("convolutions by triton", forms={"convolution": "triton"})
    if top.kernels == "auto":
        yield Technique("convolutions by cuDNN", forms={"convolution": "cudnn"})
