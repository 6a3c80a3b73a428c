"""Outputs of every block of a model, in one layout for all implementations."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detr_kernels import Packing
from torch import Tensor, nn
from torch.nn import functional as F

from detr_fast.model.detr import DETR
from detr_fast.preprocessing import Preprocessing
from detr_profiling.batches import observed_batch
from detr_profiling.observation import Observation, our_name, token_order
from detr_profiling.workload import Workload

BLOCK = (
    r"(?:transformer\.)?"
    r"((?:backbone\.layer\d|backbone\.(?:layers|blocks|stages)\.\d+|(?:encoder|decoder)\.layers\.\d+|input_proj))"
)
"""The names of modules whose outputs are compared, as `our_name` has them."""
FIRST_STAGE = r"backbone\.(layer1|layers)"
"""Its input is the stem's output, which no module of every model has."""


def observe_with_blocks(workload: Workload) -> Observation:
    """Observe the workload, and under `block NAME` the outputs of blocks (B, N, D) in float32, of a float64 model in
    float64: features with their positions in rows, tokens of images in rows of their own.

    Padded tokens, which nothing reads, are 0 in the encoder. A compiled forward has no blocks, and a model with other
    names neither. Raises ValueError for a workload that is not comparable.
    """
    if workload.observe is None:
        raise ValueError(f"{workload.name} is not comparable")
    if workload.options.runtime.compile:
        return workload.observe()
    with recorded_outputs(workload.model) as outputs:
        found = workload.observe()
    blocks, order = as_rows(outputs, workload), token_order(found)
    if order is not None:
        decoded = {name: each for name, each in blocks.items() if name.startswith("block decoder")}
        blocks |= {name: each.take_along_dim(order[..., None], 1) for name, each in decoded.items()}
    return {**blocks, **found}


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a dict of what each block of `model` returned last, as it returned it, on the CPU."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = on_cpu(output)

        return hook

    def keep_stem(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        outputs["backbone.stem"] = on_cpu(inputs[0])

    with ExitStack() as hooks:
        for module_name, module in model.named_modules():
            name = our_name(module_name)
            if re.fullmatch(FIRST_STAGE, name):
                hooks.enter_context(module.register_forward_pre_hook(keep_stem))
            if matched := re.fullmatch(BLOCK, name):
                hooks.enter_context(module.register_forward_hook(keep(matched[1])))
        yield outputs


def on_cpu(x: Tensor) -> Tensor:
    """Copy always: a later block may write over an output that it has read."""
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32), copy=True)


def as_rows(outputs: dict[str, Tensor], workload: Workload) -> Observation:
    """Make `block NAME` (B, N, D) of what `recorded_outputs` kept of the workload's observed batch."""
    if "input_proj" not in outputs:
        return {}
    padding = observed_padding(workload, outputs["input_proj"].shape[-2:])  # (B, N)
    ours = isinstance(workload.model, DETR)
    packed = isinstance(workload.model, DETR) and workload.model.transformer.packed
    blocks = {}
    for name, output in outputs.items():
        if output.dim() == 4:  # features (B, D, h, w)
            output = output.flatten(2).transpose(1, 2)
        elif not ours:  # the reference has tokens first, then images
            output = output.transpose(0, 1)
        if name.startswith("encoder"):
            if packed and bool(padding.any()):
                output = Packing.of(padding).unpack(output.flatten(0, 1))
            output = output.masked_fill(padding[..., None], 0)
        blocks[f"block {name}"] = output
    return blocks


def observed_padding(workload: Workload, size: torch.Size) -> Tensor:
    """Mark the tokens of features of `size` that are padding of the observed batch: (B, N) bool."""
    config = workload.options.network.config()
    batch = observed_batch(workload.options, config.num_classes)
    images, mask = Preprocessing(config.image_mean, config.image_std)(batch)
    if mask is None:
        return torch.zeros(len(images), size.numel(), dtype=torch.bool)
    return F.interpolate(mask[None].float(), size=size)[0].bool().flatten(1)
