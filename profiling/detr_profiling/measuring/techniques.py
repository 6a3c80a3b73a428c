"""The techniques between the plain reference and the fast path, in the order in which they are added."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detr_kernels import OPERATIONS

from detr_fast.host_memory import why_not_kept
from detr_fast.model.backends import backends_asked
from detr_fast.runtime import missing_for_compile
from detr_profiling.measuring.measurement import Configuration
from detr_profiling.measuring.runnable import facts_of, runnable_backends
from detr_profiling.workload import WorkloadOptions

REFERENCES = {name: operation.reference for name, operation in OPERATIONS.items()}
"""Every operation as the reference does it."""


@dataclass(frozen=True)
class Technique:
    """Changes a configuration in one respect: a row of the ladder."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    backends: Mapping[str, Any] = field(default_factory=dict)
    """Operation -> backend."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of it."""
    superseded: bool = False
    """A later technique takes its place: there is nothing to leave out."""

    @property
    def can_be_left_out(self) -> bool:
        """Tell whether the techniques after it mean the same without it."""
        replaced = {"precision", "channels_last", "buckets"} & self.options.keys()
        return not self.superseded and not self.settings and not replaced

    def applied(self, to: Configuration) -> Configuration:
        return replace(
            to, options=to.options.but(**self.options), backends={**to.backends, **self.backends}, **self.settings
        )


def start(options: WorkloadOptions) -> Configuration:
    """Return the reference as it comes: eager, float32 in full, NCHW, images batched at random, glibc's allocator."""
    plain: dict[str, Any] = {"channels_last": False, "kernels": "ref", "attention": "ref", "compile": False}
    plain |= {"precision": "fp32", "buckets": False, "optimize": False, "host_allocator": "system"}
    return Configuration(options.but(**plain), "reference", tf32=False)


def techniques(top: WorkloadOptions) -> list[Technique]:
    """List those that run on the device of `top`, the configuration that the ladder ends at.

    There `auto` means all that there is. Raises UserError where something asked for by name is not there.
    """
    found = list(_techniques(top))
    later = [set().union(*(each.backends for each in found[index + 1 :])) for index in range(len(found))]
    return [
        replace(each, superseded=len(each.backends) == 1 and each.backends.keys() <= after)
        for each, after in zip(found, later, strict=True)
    ]


def _techniques(top: WorkloadOptions) -> Iterator[Technique]:
    facts, runtime = facts_of(top), top.runtime
    on_gpu = facts.device.type == "cuda"
    if top.mix.size_mix == "mixed" and top.mix.buckets:
        yield Technique("buckets", options={"buckets": True})
    if on_gpu:
        yield Technique("TF32", settings={"tf32": True})
    if runtime.host_allocator == "keep" or (runtime.host_allocator == "auto" and not on_gpu and why_not_kept() is None):
        yield Technique("freed memory kept", options={"host_allocator": "keep"})
    if top.mode == "training":
        yield Technique("joint loss, fused AdamW", backends=REFERENCES, settings={"implementation": "detr_fast"})
    else:
        yield Technique("detr_fast's plain operations", backends=REFERENCES, settings={"implementation": "detr_fast"})
    if facts.dtype.itemsize == 2:
        precision = "bf16" if runtime.precision == "auto" else runtime.precision
        yield Technique(precision, options={"precision": precision})
    if runtime.channels_last:
        yield Technique("channels-last", options={"channels_last": True})
    yield from _operations(top)
    if runtime.compile and missing_for_compile() is None:
        yield Technique("compile", options={"compile": True})
    if on_gpu and runtime.kernels != "ref":
        if top.mode == "training":
            yield Technique("captured step", options={"capture": True})
        elif not runtime.compile:
            yield Technique("captured inference", options={"capture": True})


def _operations(top: WorkloadOptions) -> Iterator[Technique]:
    """Yield a row for each backend of each operation, so that none hides behind another.

    Of several that do the same work the last one stays on: the one that is asked for, or expected to win.
    """
    asked = backends_asked(top.runtime.kernels, top.runtime.attention)
    for name, operation in OPERATIONS.items():
        if name == "packed_convolution" and top.mode == "inference" and top.runtime.kernels != "ref":
            yield Technique("weights folded and rounded once", options={"optimize": True})
        if asked.get(name) == operation.reference:
            continue
        for backend in reversed(runnable_backends(operation, top)):
            if backend != operation.reference:
                yield Technique(f"{operation.title}: {backend}", backends={name: backend})
            if backend == asked.get(name):
                break
