"""Fine-tuning: weights of a detector as the start of another's training; heads that do not fit are new."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from detr_fast.config import BEYOND_DETR, UserError, require
from detr_fast.data.annotations import Category
from detr_fast.model.detr import DETR
from detr_fast.weights.architecture import from_args, from_huggingface, require_detr, visible_architecture
from detr_fast.weights.class_head import class_heads, class_names, fit_class_head, has_class_head
from detr_fast.weights.files import WeightsFile, read_weights_file
from detr_fast.weights.loading import fill
from detr_fast.weights.naming import TRUNK, NamedWeights, counterparts
from detr_fast.weights.pickles import brief, listed
from detr_fast.weights.preprocessing import preprocessed


@dataclass(frozen=True)
class FineTuningReport:
    """Report on which parts of a file a model starts from."""

    classes: list[str]
    """Names of those whose rows of the class head are kept."""
    new: list[str]
    """Parts of the model that stay as they were made, since the file has nothing that fits."""
    left_out: list[str]
    """Names in the file that are no part of the model."""
    notes: list[str]
    """Sentences on what was assumed."""

    def lines(self, path: str, num_classes: int) -> list[str]:
        """List what is kept, what is new and what was assumed."""
        first = f"{path}: the class head is kept for {len(self.classes)} of {num_classes} classes"
        if self.new:
            first += f"; new: {', '.join(self.new)}, the rest is kept"
        if self.left_out:
            first += f"; left out: {listed(self.left_out)}"
        return [first, *self.notes]


def load_for_fine_tuning(
    model: DETR, path: str | Path, categories: Sequence[Category] | None = None
) -> FineTuningReport:
    """Fill `model`, whose labels stand for `categories`, from `path`.

    Backbone and transformer must fit; the class head is kept as far as the classes agree, queries as many as both have,
    and heads that are missing or of another kind are the model's own.

    Raises UserError as `load_model` and `load_state_dict` do.
    """
    file = read_weights_file(Path(path))
    weights = NamedWeights.recognise(file.state_dict)
    require_detr(file, weights)
    otherwise = other_computation(model, file)
    stated = file.model_config if isinstance(file.model_config, dict) else {}
    rows = stated.get("num_classes") or visible_architecture(weights).get("num_classes")
    source, assumed = class_names(file, rows) if rows else (None, None)
    tensors = dict(weights.tensors)
    if stated.get("scores", "softmax") != model.config.scores:  # their rows mean something else
        tensors = {name: value for name, value in tensors.items() if not class_heads({name: value})}
    weights = NamedWeights(tensors, weights.naming, weights.left_out)
    fitted, classes = fit_class_head(model, tensors, source, categories)
    named = NamedWeights(fitted, weights.naming)
    own = model.state_dict()
    fits = has_class_head(weights, class_heads(own))
    heads, new = fitted_heads(own, named)
    outside = [name for name in named.unexpected(own) if not named.in_trunk(name)]
    tensors = {name: value for name, value in named.tensors.items() if name not in outside} | heads
    try:
        fill(model, NamedWeights(tensors, named.naming))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    notes = [*file.notes, *([assumed] if assumed and classes else []), *otherwise, *other_input(model, file)]
    return FineTuningReport(classes, new if fits else ["class_embed", *new], [*weights.left_out, *outside], notes)


def fitted_heads(own: dict[str, Tensor], weights: NamedWeights) -> tuple[dict[str, Tensor], list[str]]:
    """Return the heads' tensors for a model that has `own`, under the file's names, and which of them are new."""
    fitted: dict[str, Tensor] = {}
    new = []
    for head in dict.fromkeys(key.partition(".")[0] for key in own if not key.startswith(TRUNK["detr_fast"])):
        keys = [key for key in own if key.startswith(f"{head}.")]
        if all(key in weights and weights[key].shape == own[key].shape for key in keys):
            continue
        values = {key: own[key].clone() for key in keys}
        what = head
        if head == "query_embed" and keys[0] in weights and weights[keys[0]].shape[1:] == own[keys[0]].shape[1:]:
            source, queries = weights[keys[0]], values[keys[0]]
            rows = min(len(source), len(queries))
            queries[:rows] = source[:rows].to(queries)
            what = f"{len(queries) - rows} of {len(queries)} queries (the file has {len(source)}, as --num-queries)"
        fitted |= {counterparts(key, weights.naming)[0]: value for key, value in values.items()}
        new.append(what)
    return fitted, new


def other_computation(model: DETR, file: WeightsFile) -> list[str]:
    """List what the file's detector computes differently from `model` with weights of the same shapes.

    Raises UserError where the weights would be of no use to `model`.
    """
    stated = file.model_config if isinstance(file.model_config, dict) else {}
    stated = {**from_args(file.args), **from_huggingface(file), **stated}
    heads = stated.get("num_heads", model.config.num_heads)
    require(
        heads == model.config.num_heads,
        f"{file.path} has attention of num_heads={brief(heads)}, and the model of {model.config.num_heads}: the "
        "weights would compute something else. Start from others, or make the model with "
        f"build_model(..., num_heads={brief(heads)}).",
    )
    return [
        f"{file.path}: its detector has {name}={brief(stated[name])}, here it is {getattr(model.config, name)}"
        for name in ("dilation", *BEYOND_DETR)
        if stated.get(name, getattr(model.config, name)) != getattr(model.config, name)
    ]


def other_input(model: DETR, file: WeightsFile) -> list[str]:
    """Say how the file's images were normalised, where it differs from what `model` will see."""
    said, config = preprocessed(file), model.config
    if not said or (said["image_mean"], said["image_std"]) == (config.image_mean, config.image_std):
        return []
    return [
        f"{file.path}: its images were normalised with mean {said['image_mean']} and std {said['image_std']}, here it "
        f"is {config.image_mean} and {config.image_std}"
    ]
