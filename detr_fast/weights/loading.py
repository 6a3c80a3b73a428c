"""Models made and loaded, and their weights in and out, whoever named them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_fast.config import UserError, model_config, require
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.freezing import frozen
from detr_fast.runtime import choose_precision
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
) -> DETR:
    """Load the model that `path` holds, in evaluation mode on `device`: one of our checkpoints (its averaged weights,
    where it has them) or exports, facebookresearch's .pth, a Hugging Face folder or .safetensors; also as others save
    them, under another key or from within a wrapper.

    Whether a foreign file is DC5 cannot be seen in its weights: see `infer_config`; `dilation` says it. A detector of
    91 classes that does not name them gets COCO's names; `categories`, a COCO json or a sequence of Category, names
    them otherwise, by label. `model.notes` says what was assumed. Raises UserError where the file is unreadable,
    unsafe, or no DETR.

    `optimize`: for inference alone, as fast as the device can: in bf16 where the hardware multiplies in it, batch norm
    folded, weights in the order that convolutions take; on a GPU `predict` replays it as a CUDA graph for each shape of
    its input that comes back. Such a model cannot be trained or saved.
    """
    file = read_weights_file(Path(path))
    weights = NamedWeights.recognise(file.state_dict)
    model = DETR(infer_config(file, weights, dilation))
    try:
        fill(model, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    model.categories, assumed = class_names(file, model.config.num_classes, categories)
    outside = f"{path}: left out, since they are not the detector's: {listed(weights.left_out)}"
    model.notes = (*file.notes, *([outside] if weights.left_out else []), *([assumed] if assumed else []))
    model.to(device).eval()
    if not optimize:
        return model
    dtype, _ = choose_precision("auto", next(model.parameters()).device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    select_backends(model, dtype=dtype)
    return frozen(model, dtype)


def load_state_dict(model: DETR, state_dict: Mapping[str, Tensor]) -> None:
    """Copies `state_dict`, in any of the namings, into `model`: every entry, or none.

    What wrappers add to names is taken off, and the weights are found in a checkpoint that holds more. Raises UserError
    that lists what is missing, unexpected or of another shape, and the option that would agree.
    """
    try:
        tensors = find_weights(state_dict).tensors
    except UserError as error:
        raise UserError(f"The state dict {error}") from error
    fill(model, NamedWeights.recognise(tensors))


def export_state_dict(model: DETR, naming: Naming = "detr_fast") -> dict[str, Tensor]:
    """Return the model's weights under the names of `naming`, bit-equal; most share memory with the model.

    Raises UserError where the other implementation has no such model.
    """
    require(not model.frozen, "This model was made for inference alone: load it without optimize=True to export it.")
    if naming != "detr_fast" and (model.config.source_position or model.config.backbone == "tiny"):
        raise UserError(
            f"A model with backbone={model.config.backbone}, source_position={model.config.source_position} has no "
            f"counterpart in {naming}'s DETR. Export it with --naming detr_fast."
        )
    return to_naming(model.state_dict(), naming)


def fill(model: DETR, weights: NamedWeights) -> None:
    """Copies the weights into the model. Raises UserError before anything is copied."""
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
