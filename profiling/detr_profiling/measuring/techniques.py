"""The techniques between the plain reference and the fast path, in the order in which they are added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from detr_kernels import OPERATIONS, Facts

from detr_fast.model.backbone import DEPTHS
from detr_fast.model.backends import backends_asked
from detr_fast.runtime import choose_device, choose_precision, missing_for_compile
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.workload import WorkloadOptions

REFERENCES = {name: operation.reference for name, operation in OPERATIONS.items()}
"""Every operation as the reference does it."""
OF_OUR_BACKBONES = ("frozen_batch_norm", "convolution", "residual_stage", "packed_convolution")
"""Operations that a timm backbone and live batch norm do not have."""


@dataclass(frozen=True)
class Technique:
    """One change of a configuration."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, Any] = field(default_factory=dict)
    """Operation -> backend."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of it."""
    superseded: bool = False
    """A later technique takes its place: there is nothing to leave out."""

    @property
    def can_be_left_out(self) -> bool:
        """Whether the techniques after it mean the same without it."""
        replaced = {"precision", "channels_last", "buckets"} & self.options.keys()
        return not self.superseded and not self.settings and not replaced

    def applied(self, to: Configuration) -> Configuration:
        return replace(
            to, options=replace(to.options, **self.options), forms={**to.forms, **self.forms}, **self.settings
        )


def start(options: WorkloadOptions) -> Configuration:
    """Return the reference as it comes: eager, float32 in full, NCHW, images batched at random."""
    plain: dict[str, Any] = {"channels_last": False, "kernels": "ref", "attention": "ref", "compile": False}
    return Configuration(
        replace(options, precision="fp32", buckets=False, optimize=False, **plain),
        "reference",
        tf32=False,
        keeps_memory=False,
    )


def techniques(top: WorkloadOptions) -> list[Technique]:
    """List those that `top` asks for, the configuration that the ladder ends at, and that run on its device.

    There `auto` means all that there is. Raises UserError where something asked for by name is not there.
    """
    found = list(_techniques(top))
    later = [set().union(*(each.forms for each in found[index + 1 :])) for index in range(len(found))]
    return [
        replace(each, superseded=len(each.forms) == 1 and each.forms.keys() <= after)
        for each, after in zip(found, later, strict=True)
    ]


def _techniques(top: WorkloadOptions) -> Iterator[Technique]:
    device, _ = choose_device(top.device)
    on_gpu = device.type == "cuda"
    dtype, _ = choose_precision(top.precision, device)
    if top.size_mix == "mixed" and top.buckets:
        yield Technique("buckets", options={"buckets": True})
    if on_gpu:
        yield Technique("TF32", settings={"tf32": True})
    else:
        yield Technique("freed memory kept", settings={"keeps_memory": True})
    if top.mode == "training":
        yield Technique("joint loss, fused AdamW", forms=REFERENCES, settings={"implementation": "detr_fast"})
    else:
        yield Technique("detr_fast's plain operations", forms=REFERENCES, settings={"implementation": "detr_fast"})
    if dtype.itemsize == 2:
        precision = "bf16" if top.precision == "auto" else top.precision
        yield Technique(precision, options={"precision": precision})
    if top.channels_last:
        yield Technique("channels-last", options={"channels_last": True})
    yield from _operations(top, device, dtype)
    if top.compile and missing_for_compile() is None:
        yield Technique("compile", options={"compile": True})
    if on_gpu and top.kernels != "ref":
        if top.mode == "training":
            yield Technique("captured step", options={"capture": True})
        elif not top.compile:
            yield Technique("captured inference", options={"capture": True})


def _operations(top: WorkloadOptions, device: torch.device, dtype: torch.dtype) -> Iterator[Technique]:
    """Yield a row for each backend of each operation, so that none hides behind another.

    Of several that do the same work the last one stays on: the one that is asked for, or expected to win.
    """
    config = top.architecture()
    facts = Facts(
        device,
        dtype,
        training=top.mode == "training",
        dropout=config.dropout if top.mode == "training" else 0.0,
        head_dim=config.hidden_dim // config.num_heads,
        compiled=bool(top.compile),
    )
    asked = backends_asked(top.kernels, top.attention)
    for name, operation in OPERATIONS.items():
        if name == "packed_convolution" and top.mode == "inference" and top.kernels != "ref":
            yield Technique("weights folded and rounded once", options={"optimize": True})
        elsewhere = operation.mode not in (None, top.mode) or (name == "dropout" and not config.dropout)
        if elsewhere or (name in OF_OUR_BACKBONES and config.backbone not in DEPTHS):
            continue
        for backend in reversed(operation.backends[:-1]):
            if asked.get(name) == operation.reference:
                break
            if backend.name == "triton" and device.type == "cpu":  # the interpreter
                continue
            if backend.why_not(facts) is None and backend.name != REFERENCES[name]:
                yield Technique(f"{operation.title}: {backend.name}", forms={name: backend.name})
            if backend.name == asked.get(name):
                break
