"""Names of DETR's weights here, in facebookresearch/detr and in Hugging Face transformers.

`counterparts` states them once, from a key of ours to the keys that hold the same numbers there; reading and writing
both follow from it. Ours is facebookresearch's naming with `backbone.0.body.` cut to `backbone.`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detr_fast.weights.wrappings import unwrapped

Naming = Literal["detr_fast", "facebook", "huggingface"]
FoundNaming = Naming | Literal["huggingface_resnet"]
"""A naming as found in a file: Hugging Face's backbone is timm's, or its own ResNet, which renames every layer."""

Renames = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

BACKBONE_PREFIX = {
    "facebook": "backbone.0.body.",
    "huggingface": "model.backbone.model.",
    "huggingface_resnet": "model.backbone.model.",
}

TO_HUGGINGFACE: Renames = (
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^input_proj\.", "model.input_projection."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"\.multihead_attn\.", ".encoder_attn."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"\.norm[23]\.", ".final_layer_norm."),
)

TO_HUGGINGFACE_RESNET: Renames = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.", lambda found: f"encoder.stages.{int(found[1]) - 1}.layers.{found[2]}."),
    (r"\.conv(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)

FROM_OLDER_HUGGINGFACE: Renames = (
    (r"^model\.backbone\.conv_encoder\.", "model.backbone."),
    (r"\.out_proj\.", ".o_proj."),
    (r"(layers\.\d+)\.fc([12])\.", r"\1.mlp.fc\2."),
)
"""Checkpoints on the hub still carry these names; transformers renames them while loading."""


ANCHORS = (
    "transformer.decoder.layers.0.linear1.weight",
    "model.decoder.layers.0.self_attn.q_proj.weight",
)
"""Names that every DETR has, in the two kinds of naming: what a file puts before them is a wrapper's."""
HEADLESS_ANCHOR = "decoder.layers.0.self_attn.q_proj.weight"
"""Names of Hugging Face's DetrModel, which has no heads and no `model.` before them."""
TRUNK = {
    "detr_fast": ("backbone.", "transformer.", "input_proj."),
    "huggingface": ("model.backbone.", "model.encoder.", "model.decoder.", "model.input_projection."),
}
"""Beginnings of the backbone's and the transformer's names; the rest are heads and queries."""
IMAGE_SIDE = ("backbone.", "input_proj.", "model.backbone.", "model.input_projection.")
"""Beginnings of the names before the transformer."""
HEADS = ("class_embed", "bbox_embed", "query_embed")
"""The rest, in our naming: what a detector can learn anew."""
HEAD_WEIGHTS = (
    *(
        f"{layer}.{kind}"
        for layer in ("class_embed", *(f"bbox_embed.layers.{i}" for i in range(3)))
        for kind in ("weight", "bias")
    ),
    "query_embed.weight",
)


def rename(key: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def counterparts(key: str, naming: FoundNaming) -> tuple[str, ...]:
    """Return the keys in `naming` whose tensors, joined along their first axis, are ours under `key`.

    They are three for a query-key-value projection at Hugging Face, else one.
    """
    if naming == "detr_fast":
        return (key,)
    if key.startswith("backbone."):
        inner = key.removeprefix("backbone.").removeprefix("body.")  # a timm backbone is wrapped once more here
        if naming == "huggingface_resnet":
            inner = rename(inner, TO_HUGGINGFACE_RESNET)
        return (BACKBONE_PREFIX[naming] + inner,)
    if naming == "facebook":
        return (key,)
    renamed = rename(key, TO_HUGGINGFACE)
    if ".in_proj_" in renamed:
        return tuple(renamed.replace(".in_proj_", f".{part}_proj.") for part in "qkv")
    return (renamed,)


def naming_of(keys: Iterable[str]) -> FoundNaming:
    """Tell which naming the keys of a state dict follow; ours where nothing speaks for another."""
    keys = list(keys)
    if any(key.startswith(("model.backbone.", "class_labels_classifier.")) for key in keys):
        return "huggingface_resnet" if any(".embedder.embedder." in key for key in keys) else "huggingface"
    if any(key.startswith(BACKBONE_PREFIX["facebook"]) for key in keys):
        return "facebook"
    return "detr_fast"


@dataclass(frozen=True)
class NamedWeights:
    """A state dict in any naming, read through our keys."""

    tensors: Mapping[str, Tensor]
    naming: FoundNaming
    left_out: tuple[str, ...] = ()
    """Names that lie outside the detector: a mask head beside `detr.`, a teacher, a loss."""

    @classmethod
    def recognise(cls, state_dict: Mapping[str, Tensor]) -> "NamedWeights":
        """Return the weights without what wrappers put before and into their names."""
        tensors, left_out = unwrapped(state_dict, ANCHORS)
        if HEADLESS_ANCHOR in tensors:
            tensors = {f"model.{name}": value for name, value in tensors.items()}
        naming = naming_of(tensors)
        if naming.startswith("huggingface"):
            tensors = {rename(key, FROM_OLDER_HUGGINGFACE): value for key, value in tensors.items()}
            naming = naming_of(tensors)
        return cls(tensors, naming, left_out)

    @property
    def is_detr(self) -> bool:
        """Tell whether there is DETR's transformer with a backbone or projection, which language models lack."""
        transformer = any(anchor in self.tensors for anchor in ANCHORS)
        return transformer and any(name.startswith(IMAGE_SIDE) for name in self.tensors)

    def lacking(self, keys: Iterable[str]) -> list[str]:
        """Return those of HEADS of which any of our `keys` is missing here."""
        return [head for head in HEADS if any(key.startswith(f"{head}.") and key not in self for key in keys)]

    def in_trunk(self, name: str) -> bool:
        """Tell whether a name, as it is in the file, is one of backbone and transformer."""
        return name.startswith(TRUNK["huggingface" if self.naming.startswith("huggingface") else "detr_fast"])

    def __contains__(self, key: str) -> bool:
        return all(name in self.tensors for name in counterparts(key, self.naming))

    def __getitem__(self, key: str) -> Tensor:
        """Return the tensor under our `key`. Raises KeyError."""
        parts = [self.tensors[name] for name in counterparts(key, self.naming)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unexpected(self, keys: Iterable[str]) -> list[str]:
        """Return the names, as they are in the file, that are no counterpart of any of our `keys`.

        A batch norm's count of batches is left aside: a frozen one has no use for it.
        """
        known = {name for key in keys for name in counterparts(key, self.naming)}
        return [name for name in self.tensors if name not in known and not name.endswith("num_batches_tracked")]


def to_naming(state_dict: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Return our state dict under the names of `naming`; what is split is copied, the rest shares memory."""
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        names = counterparts(key, naming)
        parts = [value] if len(names) == 1 else [part.clone() for part in value.chunk(len(names))]
        result |= zip(names, parts, strict=True)
    return result
