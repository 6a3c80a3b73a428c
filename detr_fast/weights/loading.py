"""Building of networks, loading of detectors, and weights in and out in any naming."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_fast.config import UserError, model_config, require
from detr_fast.detector import Detector
from detr_fast.host_memory import choose_host_allocator, use_host_allocator
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import OptimizedDETR
from detr_fast.options import HostAllocator, RuntimeOptions
from detr_fast.runtime import runtime_for_inference
from detr_fast.weights.architecture import agreeing_options, infer_config, no_detr, visible_architecture
from detr_fast.weights.backbone_weights import load_backbone_weights
from detr_fast.weights.class_head import Given, class_names
from detr_fast.weights.files import read_weights_file
from detr_fast.weights.naming import NamedWeights, Naming, to_naming
from detr_fast.weights.pickles import brief, listed
from detr_fast.weights.wrappings import find_weights


def build_model(name: str, num_classes: int | None = None, backbone_weights: str = "none", **changes: Any) -> DETR:
    """Make a new model: a preset's name or a timm backbone's, with random weights but for the backbone's, where given.

    `num_classes` counts without "no object" (presets: 91); `backbone_weights` is "none", "imagenet" or a file;
    `changes` are ModelConfig fields. Raises UserError for an unknown name or weights that cannot be had.
    """
    if num_classes is not None:
        changes["num_classes"] = num_classes
    model = DETR(model_config(name, **changes))
    load_backbone_weights(model.backbone, model.config.backbone, backbone_weights)
    return model


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dilation: bool | None = None,
    optimize: bool = False,
    categories: Given = None,
    host_allocator: HostAllocator = "auto",
) -> Detector:
    """Load the detector that `path` holds, in evaluation mode on `device`: see `read_detector`.

    `optimize`: for inference alone, as fast as the device can, as the predict command runs it: with what was measured
    here (`python -m detr_profiling tune`), else in bf16 where the hardware multiplies in it, batch norm folded, weights
    in the order that convolutions take; on a GPU `predict` replays it as a CUDA graph for each shape of its input that
    comes back. Such a network cannot be trained, and its weights cannot be exported.

    `host_allocator`: as the commands' --host-allocator; `auto` keeps freed memory on a CPU. It is the whole process's,
    and cannot be taken back. Raises UserError as `read_detector` does, and where what is asked for cannot be had.
    """
    detector, device = read_detector(path, dilation, categories), torch.device(device)
    options = RuntimeOptions(device=device.type, host_allocator=host_allocator)  # type: ignore[arg-type]
    if optimize:
        runtime = runtime_for_inference(options, detector.config, batch_size=1)
        return detector.optimize(replace(runtime, device=device))
    use_host_allocator(choose_host_allocator(host_allocator, device)[0])
    return detector.to(device)


def read_detector(path: str | Path, dilation: bool | None = None, categories: Given = None) -> Detector:
    """Read a detector, in evaluation mode on the CPU.

    `path` is one of our checkpoints (its EMA weights, where it has them) or exports, facebookresearch's .pth, a Hugging
    Face folder or .safetensors; also with the weights under another key or a wrapper's names. `dilation`: whether a
    foreign file is DC5, which its weights do not show (see `infer_config`). A detector of 91 classes that does not name
    them gets COCO's names; `categories`, a COCO json or a sequence of Category, names them otherwise, by label. The
    detector's `notes` say what was assumed. Raises UserError where the file is unreadable, unsafe, or no DETR.
    """
    file = read_weights_file(Path(path))
    weights = NamedWeights.recognise(file.state_dict)
    network = DETR(infer_config(file, weights, dilation))
    try:
        fill(network, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    found, assumed = class_names(file, network.config.num_classes, categories)
    outside = f"{path}: left out, since they are not the detector's: {listed(weights.left_out)}"
    notes = (*file.notes, *([outside] if weights.left_out else []), *([assumed] if assumed else []))
    return Detector(network.eval(), found, notes)


def load_state_dict(model: DETR | Detector, state_dict: Mapping[str, Tensor]) -> None:
    """Copy `state_dict`, in any of the namings, into `model`: every entry, or none.

    What wrappers add to names is taken off, and the weights are found in a checkpoint that holds more. Raises UserError
    that lists what is missing, unexpected or of another shape, and the option that would agree.
    """
    try:
        tensors = find_weights(state_dict).tensors
    except UserError as error:
        raise UserError(f"The state dict {error}") from error
    fill(network_of(model), NamedWeights.recognise(tensors))


def export_state_dict(model: DETR | Detector, naming: Naming = "detr_fast") -> dict[str, Tensor]:
    """Return the model's weights under the names of `naming`, bit-equal; most share memory with the model.

    Raises UserError where the other implementation has no such model.
    """
    network = network_of(model)
    config = network.config
    if naming != "detr_fast" and (config.beyond_detr or config.backbone == "tiny"):
        own = ", ".join(
            f"{name}={value}" for name, value in ({"backbone": config.backbone} | config.beyond_detr).items()
        )
        raise UserError(f"A model with {own} has no counterpart in {naming}'s DETR. Export it with --naming detr_fast.")
    return to_naming(network.state_dict(), naming)


def network_of(model: DETR | Detector) -> DETR:
    """Return the network itself. Raises UserError for one that was optimised for inference."""
    network = model.network if isinstance(model, Detector) else model
    optimized = isinstance(network, OptimizedDETR)
    require(not optimized, "This model was optimised for inference alone: load it without optimize=True.")
    return network


def fill(model: DETR, weights: NamedWeights) -> None:
    """Copy the weights into the model. Raises UserError before anything is copied."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = weights.unexpected(own)
    found = {key: weights[key] for key in own if key in weights}
    differing = [
        f"{brief(key)} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in found.items()
        if value.shape != own[key].shape
    ]
    require(len(found) > 0, f"It {no_detr(weights)}")
    unlike = [
        f"{key} ({str(value.dtype).removeprefix('torch.')})"
        for key, value in found.items()
        if own[key].is_floating_point() and not value.is_floating_point()
    ]
    require(not unlike, f"the weights are complex or quantised: {listed(unlike)}. Give floating-point numbers.")
    if missing or unexpected or differing:
        lists = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
        lines = [f"{len(keys)} {what}: {listed(keys, longest=160)}" for what, keys in lists.items() if keys]
        options = agreeing_options(model.config, visible_architecture(weights))
        hint = "This is another architecture."
        if options:
            hint = f"A model made with {' '.join(options)} would agree."
        elif not (unexpected or differing):
            hint = "They are not in the file: give a whole one."
        raise UserError("\n  ".join(["the weights do not fit the model.", *lines, hint]))
    model.load_state_dict(found)
