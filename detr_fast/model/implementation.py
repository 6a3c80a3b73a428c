"""Which form of each replaceable operation a model runs, chosen in one place, with the reason."""

from torch import nn

from detr_fast.config import Attention, Kernels
from detr_fast.model.attention import MultiheadAttention
from detr_fast.model.normalization import FrozenBatchNorm2d


def choose_attention(kernels: Kernels, attention: Attention) -> tuple[str, str]:
    """The attention to run, "sdpa" or "ref", and why."""
    if attention != "auto":
        return attention, "asked for by --attention"
    if kernels == "ref":
        return "ref", "--kernels ref"
    return "sdpa", "fused, without materialised weights where the device can"


def select_implementation(model: nn.Module, kernels: Kernels = "auto", attention: Attention = "auto") -> dict[str, str]:
    """Sets the model's operations and returns what was chosen for each, with the reason. Weights are not touched."""
    chosen, reason = choose_attention(kernels, attention)
    folded = kernels != "ref"
    result = {"attention": f"{chosen} ({reason})"}
    for module in model.modules():
        if isinstance(module, MultiheadAttention):
            module.implementation = chosen
        elif isinstance(module, FrozenBatchNorm2d):
            module.folded = folded
            result["frozen batch norm"] = "folded into convolutions" if folded else "by itself (--kernels ref)"
    return result
