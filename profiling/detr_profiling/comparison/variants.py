"""The variants of our model that parity compares: each precision by default, compiled, and as else was asked for."""

from dataclasses import dataclass

from detr_fast.config import require
from detr_fast.options import Attention, Kernels, Precision
from detr_profiling.workload import WorkloadOptions

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
Backends = tuple[Kernels, Attention]
ON_A_GPU: tuple[Backends, ...] = (("triton", "auto"), ("auto", "sdpa"))
"""By default attention is xformers there."""
REFERENCE_ORDER = "fp32 ref"
"""DETR's own sequence of operations, nothing fused or folded."""


@dataclass(frozen=True)
class Variant:
    """One variant of ours; or a baseline, which is compared in inference alone."""

    name: str
    options: WorkloadOptions
    asked: bool = True
    """Asked for by name, or there on any machine: an error where it cannot run. Others are left out then."""
    baseline: str | None = None

    @property
    def trains(self) -> bool:
        """Tell whether a training curve and AP are to be had of it, and say something."""
        return self.baseline is None and self.name != REFERENCE_ORDER


def build_variants(options: WorkloadOptions) -> list[Variant]:
    """List those of --precision, or of both where it is auto, last those that compile, which takes minutes.

    Raises UserError for fp16, of which the reference has no eager run.
    """
    require(options.runtime.precision != "fp16", "parity compares fp32 and bf16. Use --precision bf16, fp32 or auto.")
    runtime, base = options.runtime, options.resolved().but(compile=False, kernels="auto", attention="auto")
    asked_for: dict[Backends, bool] = {("auto", "auto"): True}
    if base.runtime.device == "cuda":
        asked_for |= dict.fromkeys(ON_A_GPU, False)
    asked_for[runtime.kernels, runtime.attention] = True
    variants = [Variant(REFERENCE_ORDER, base.but(precision="fp32", kernels="ref"))]
    for precision in PRECISIONS if runtime.precision == "auto" else (runtime.precision,):
        for (kernels, attention), asked in asked_for.items():
            changed = base.but(precision=precision, kernels=kernels, attention=attention)
            words = [precision, *dict.fromkeys(word for word in (kernels, attention) if word != "auto")]
            variants.append(Variant(" ".join(words), changed, asked))
            if runtime.compile and asked:
                variants.append(Variant(" ".join([*words, "compiled"]), changed.but(compile=True)))
    if options.network.config().backbone.startswith("resnet"):
        inference = base.but(precision="fp32", mode="inference")
        variants.append(Variant("hf", inference, asked=False, baseline="hf-sdpa"))
    unique = {variant.name: variant for variant in variants}
    return sorted(unique.values(), key=lambda variant: bool(variant.options.runtime.compile))
