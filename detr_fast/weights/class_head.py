"""The class head: the classes of its rows, and its reuse when a detector learns other classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from detr_fast.config import UserError, require
from detr_fast.data import annotations
from detr_fast.data.annotations import Category
from detr_fast.data.categories import UNUSED, spelling
from detr_fast.model.detr import DETR
from detr_fast.weights.files import WeightsFile
from detr_fast.weights.naming import NamedWeights, counterparts

COCO_NUM_CLASSES = 91
NO_ID = -1
"""Name of a class that the data does not have."""


def fit_class_head(
    model: DETR,
    state_dict: Mapping[str, Tensor],
    source_categories: Sequence[Category] | None,
    own_categories: Sequence[Category] | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return `state_dict`, in its own naming, with class heads for the model's classes, and the names of those kept.

    A row of the source is kept where the class's name agrees, whatever the case; "no object" is always kept; the other
    rows are the model's own. Where either side's names are unknown and the sizes agree, the whole head is kept; a head
    that is missing, or of another kind, is the model's own.
    """
    weights = NamedWeights.recognise(state_dict)
    own = class_heads(model.state_dict())
    if not has_class_head(weights, own):
        return {**weights.tensors, **{counterparts(key, weights.naming)[0]: value for key, value in own.items()}}, []
    unknown = source_categories is None or own_categories is None
    if unknown and all(weights[key].shape == value.shape for key, value in own.items()):
        return dict(weights.tensors), [category.name for category in source_categories or own_categories or ()]
    rows = {} if unknown else _agreeing_rows(source_categories or (), own_categories or ())
    no_object = [(-1, -1)] if model.config.scores == "softmax" else []
    head = {key: _fitted_rows(value, weights[key], [*rows.items(), *no_object]) for key, value in own.items()}
    renamed = {counterparts(key, weights.naming)[0]: value for key, value in head.items()}
    return {**weights.tensors, **renamed}, [(own_categories or ())[row].name for row in rows]


def class_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all class heads: the decoder's, one for all layers or each its own, and the proposals'."""
    return {key: value for key, value in tensors.items() if "class_embed" in key.split(".")}


def has_class_head(weights: NamedWeights, own: Mapping[str, Tensor]) -> bool:
    """Tell whether the weights have a class head like the model's, `own`: the same tensors, with any number of rows."""
    if not all(key in weights and weights[key].dim() == value.dim() for key, value in own.items()):
        return False
    rows = {len(weights[key]) for key in own}
    return len(rows) == 1 and 0 not in rows and all(weights[key].shape[1:] == own[key].shape[1:] for key in own)


def _agreeing_rows(source: Sequence[Category], own: Sequence[Category]) -> dict[int, int]:
    """Map own rows to source rows of classes whose names agree; of several, as COCO's "N/A", to the same row."""
    theirs = [spelling(category.name) for category in source]
    row_of = {name: row for row, name in enumerate(theirs)}
    names = [spelling(category.name) for category in own]
    return {
        row: row if name in theirs[row : row + 1] else row_of[name] for row, name in enumerate(names) if name in row_of
    }


def _fitted_rows(own: Tensor, source: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Copy `rows` of `source`, pairs of own and source row, into a copy of `own`."""
    fitted = own.clone()
    for mine, theirs in rows:
        fitted[mine] = source[theirs].to(own)
    return fitted


Given = str | Path | Sequence[Category] | None
"""Classes that a person names: a COCO json, or the categories themselves."""


def class_names(
    file: WeightsFile, num_classes: int, given: Given = None
) -> tuple[tuple[Category, ...] | None, str | None]:
    """Return the category of each label of the file's detector, and how it was found where the file does not state it.

    The file's own names count, with the ids of `given` where that has the same names; else `given`, whose ids are the
    labels; else COCO's names for 91 classes. None: labels are ids without names. Raises UserError for names that the
    head has no rows for.
    """
    stated = stated_categories(file, num_classes)
    if given is not None:
        categories = given_categories(given)
        source = str(given) if isinstance(given, str | Path) else "the given categories"
        known = {spelling(category.name) for category in stated or ()}
        if stated and all(spelling(category.name) in known for category in categories):
            return with_ids(stated, categories), f"{file.path}: its own names, with the ids of {source}"
        chosen, labels = by_label(categories, num_classes, source)
        return chosen, f"{file.path}: its labels are {labels}"
    if stated:
        return stated, None
    if num_classes == COCO_NUM_CLASSES:
        return coco_categories(), (
            f"{file.path} names none of its {num_classes} classes: COCO's names are assumed. "
            "If it was trained on others, name them with --categories FILE.json, a COCO json."
        )
    return None, (
        f"{file.path} names none of its {num_classes} classes: labels are category ids, without names. "
        "Name them with --categories FILE.json, a COCO json."
    )


def stated_categories(file: WeightsFile, num_classes: int) -> tuple[Category, ...] | None:
    """Return the categories that the file itself states. Raises UserError where they do not fit its head."""
    names = file.huggingface_config.get("id2label")
    names = names if isinstance(names, dict) else {}
    labels = tuple(Category(label, str(names.get(str(label), UNUSED))) for label in range(num_classes)) if names else ()
    if file.categories is not None:
        try:
            stated = tuple(Category(id=entry["id"], name=str(entry["name"])) for entry in file.categories)
        except (TypeError, KeyError, IndexError) as error:
            raise UserError(f"{file.path}: its categories are no list of ids and names.") from error
        ids = [one.id for one in stated if one.id != NO_ID]
        right = all(type(one) is int for one in ids) and len(ids) == len(set(ids))
        require(right, f"{file.path}: the ids of its categories must be whole numbers, each once.")
        if not labels or [one.name for one in labels] == [one.name for one in stated]:
            size = f"{file.path}: it names {len(stated)} categories, its class head has {num_classes}."
            require(len(stated) == num_classes, size)
            return stated
    return labels if any(not one.name.startswith(("LABEL_", UNUSED)) for one in labels) else None


def given_categories(given: str | Path | Sequence[Category]) -> tuple[Category, ...]:
    """Return given categories, or those of a COCO json, by ascending id. Raises UserError where there are none."""
    if not isinstance(given, str | Path):
        require(len(given) > 0, "categories: none are given: give one for each class, or None.")
        return tuple(sorted(given, key=lambda category: category.id))
    file = Path(given)
    return annotations.read_categories(file, annotations.section(file, annotations.load_json(file), "categories"))


def with_ids(stated: Sequence[Category], categories: Sequence[Category]) -> tuple[Category, ...]:
    """Return the stated classes with the ids that `categories` has for their names; NO_ID where it has none."""
    named = {spelling(category.name): category for category in categories}
    return tuple(named.get(spelling(one.name), Category(NO_ID, one.name)) for one in stated)


def by_label(categories: Sequence[Category], num_classes: int, source: str) -> tuple[tuple[Category, ...], str]:
    """Return a category for each label, and what labels are.

    Labels are the ids where the head has rows for all, as facebookresearch's has; else, where there are as many
    categories as labels, these in order. Raises UserError where neither holds.
    """
    largest = categories[-1].id
    if largest >= num_classes:
        require(
            len(categories) == num_classes,
            f"--categories {source}: its {len(categories)} categories have ids up to {largest}, but the class head has "
            f"{num_classes} classes, 0 to {num_classes - 1}. Give the json of the data that it was trained on.",
        )
        return tuple(categories), f"the categories of {source} in ascending order of ids"
    name_of = {category.id: category.name for category in categories}
    return tuple(
        Category(label, name_of.get(label, UNUSED)) for label in range(num_classes)
    ), f"the category ids of {source}"


def coco_categories() -> tuple[Category, ...]:
    """Return COCO's classes by raw id, 0 to 90, as torchvision lists them; unused ids are called N/A."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(Category(label, name) for label, name in enumerate(names))
