"""Inference of a model's architecture from a file of weights: its tensors' shapes and the files beside it."""

from collections.abc import Iterable
from itertools import count, takewhile
from typing import Any

from detr_fast.config import MODELS, ModelConfig, UserError, model_config, require
from detr_fast.model.backbone import DEPTHS
from detr_fast.options import NetworkOptions
from detr_fast.weights.files import WeightsFile
from detr_fast.weights.naming import ANCHORS, HEAD_WEIGHTS, NamedWeights
from detr_fast.weights.pickles import brief, listed
from detr_fast.weights.preprocessing import preprocessed

OWN_BACKBONES = (*DEPTHS, "tiny")
STAGE3_DEPTHS = {depths[2]: name for name, depths in DEPTHS.items()}


def visible_architecture(weights: NamedWeights) -> dict[str, Any]:
    """Return the fields of ModelConfig that can be seen in names and shapes. DC5 and the number of heads cannot."""

    def size(key: str, axis: int) -> int | None:
        return weights[key].shape[axis] if key in weights and weights[key].dim() > axis else None

    def number(pattern: str) -> int:
        return sum(1 for _ in takewhile(lambda index: pattern.format(index) in weights, count()))

    class_entries = size("class_embed.weight", 0)
    seen = {
        "backbone": STAGE3_DEPTHS.get(number("backbone.layer3.{}.conv3.weight")),
        "num_classes": class_entries - 1 if class_entries else None,
        "num_queries": size("query_embed.weight", 0),
        "hidden_dim": size("transformer.decoder.norm.weight", 0),
        "feedforward_dim": size("transformer.decoder.layers.0.linear1.weight", 0),
        "encoder_layers": number("transformer.encoder.layers.{}.linear1.weight"),
        "decoder_layers": number("transformer.decoder.layers.{}.linear1.weight"),
    }
    return {name: value for name, value in seen.items() if value is not None}


def infer_config(file: WeightsFile, weights: NamedWeights, dilation: bool | None = None) -> ModelConfig:
    """Infer the architecture of `weights`, read from `file`.

    Our own files state it, and a preprocessor_config.json how images are resized and normalised. Otherwise shapes give
    most of it, and `dilation` (DC5) comes from the argument, else from the file's training options or config.json, else
    from "dc5" in the file's name. Raises UserError where it is not DETR's or cannot be told.
    """
    require_detr(file, weights)
    config = None if file.model_config is None else make_config(file, file.model_config)
    own_heads = config is not None and (config.layer_heads or config.query_positions != "learned")
    if lacking := [] if own_heads else weights.lacking(HEAD_WEIGHTS):
        raise UserError(f"{file.path} {without_heads(lacking)}")
    visible = visible_architecture(weights)
    if config is not None:
        check_agreement(file, config, visible)
        return make_config(file, config.to_dict() | preprocessed(file))
    companions = {**from_args(file.args), **from_huggingface(file)}
    if dilation is not None:
        companions["dilation"] = dilation
    companions.setdefault("dilation", "dc5" in file.path.name.lower())
    values = visible | companions
    if not {"backbone", "hidden_dim", "feedforward_dim"} <= values.keys():
        raise UserError(
            f"{file.path} does not look like a DETR with a ResNet-50 or ResNet-101 backbone: "
            f"its first names are {listed(sorted(weights.tensors), 3)}."
        )
    return make_config(file, values | preprocessed(file))


def require_detr(file: WeightsFile, weights: NamedWeights) -> None:
    """Raise UserError for another model than DETR, by its config.json or its names."""
    kind = file.huggingface_config.get("model_type", "detr")
    require(kind == "detr", f"{file.path} is a model of type {brief(kind)}, not a DETR: its config.json says so.")
    require(weights.is_detr, f"{file.path} {no_detr(weights)}")


def no_detr(weights: NamedWeights) -> str:
    """Describe weights whose names are not DETR's, as the rest of a sentence."""
    return (
        f"does not look like a DETR: its first names are {listed(sorted(weights.tensors), 3)}; "
        f"facebookresearch/detr has such as {ANCHORS[0]}, Hugging Face {ANCHORS[1]}; "
        "a backbone alone is for train --backbone-weights."
    )


def without_heads(lacking: Iterable[str]) -> str:
    """Describe weights that lack some of HEADS, as the rest of a sentence."""
    names = {"class_embed": "class head", "bbox_embed": "box head", "query_embed": "queries"}
    missing = ", ".join(f"{names[head]} ({head})" for head in lacking)
    return f"lacks DETR's {missing}: it can only be trained from, with train --weights."


def make_config(file: WeightsFile, values: dict[str, Any]) -> ModelConfig:
    """Make a ModelConfig with a backbone that exists. Raises UserError that names the file."""
    try:
        config = ModelConfig.from_dict(values)
        if config.backbone not in OWN_BACKBONES:
            model_config(config.backbone)  # raises for what is no timm model
        return config
    except (UserError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file.path} describes no model that can be built: {brief(error, 300)}") from error


def check_agreement(file: WeightsFile, config: ModelConfig, visible: dict[str, Any]) -> None:
    """Raise UserError, before anything is built, where the stated configuration and the shapes contradict each other.

    A timm backbone may well look like a ResNet.
    """
    if config.scores == "sigmoid":
        visible = {
            name: value for name, value in visible.items() if name != "num_classes"
        }  # told from softmax's logits
    for name, value in visible.items():
        stated = getattr(config, name)
        if stated != value and not (name == "backbone" and stated not in OWN_BACKBONES):
            raise UserError(
                f"{file.path} contradicts itself: model_config has {name}={brief(stated)}, its weights {value}."
            )


def from_args(args: dict[str, Any]) -> dict[str, Any]:
    """Read facebookresearch's training options, as far as the shapes do not say them."""
    names = {"dilation": ("dilation", bool), "nheads": ("num_heads", int), "dropout": ("dropout", float)}
    return {ours: args[theirs] for theirs, (ours, kind) in names.items() if type(args.get(theirs)) is kind}


def from_huggingface(file: WeightsFile) -> dict[str, Any]:
    """Read Hugging Face's config.json, as far as the shapes do not say it."""
    config = file.huggingface_config
    if not config:
        return {}
    kept = {"position_embedding_type": "sine", "activation_function": "relu", "auxiliary_loss": False}
    for name, value in kept.items():
        if config.get(name, value) != value:
            raise UserError(
                f"{file.path}: its config.json has {name}={brief(config[name])}, which computes something else than "
                f"DETR; only {value!r} can be loaded."
            )
    heads = config.get("encoder_attention_heads", 8)
    decoder_heads = config.get("decoder_attention_heads", heads)
    require(
        decoder_heads == heads,
        f"{file.path}: its config.json has encoder_attention_heads={brief(heads)} and decoder_attention_heads="
        f"{brief(decoder_heads)}; only the same number can be loaded.",
    )
    backbone = config.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    found = {
        "dilation": bool(config.get("dilation")) or backbone.get("output_stride") == 16,
        "num_heads": heads,
        "dropout": config.get("dropout", 0.1),
    }
    timm_name = backbone.get("backbone") or config.get("backbone")
    return found | ({"backbone": str(timm_name)} if timm_name else {})


def agreeing_options(config: ModelConfig, visible: dict[str, Any]) -> list[str]:
    """List the command line's options, or fields of ModelConfig, under which a model would have the `visible` sizes."""
    # where no layer has a name that is known, 0 says nothing
    differing = {name: value for name, value in visible.items() if getattr(config, name) != value and value}
    options = []
    if "backbone" in differing:
        backbone = differing.pop("backbone")
        options += [
            f"--model {name}"
            for name, preset in MODELS.items()
            if preset.backbone == backbone and preset.dilation == config.dilation
        ]
    for name in [name for name in differing if name in NetworkOptions.field_types()]:
        options.append(f"--{name.replace('_', '-')} {differing.pop(name)}")
    return options + [f"{name}={value} (ModelConfig)" for name, value in differing.items()]
