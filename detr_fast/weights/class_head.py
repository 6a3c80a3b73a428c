"""The class head: what its rows stand for, and how it is kept when a detector learns other classes."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from detr_fast.config import UserError
from detr_fast.data.annotations import Category
from detr_fast.model.detr import DETR
from detr_fast.weights.files import WeightsFile
from detr_fast.weights.naming import NamedWeights, counterparts

COCO_NUM_CLASSES = 91


def fit_class_head(
    model: DETR,
    state_dict: Mapping[str, Tensor],
    source_categories: Sequence[Category] | None,
    own_categories: Sequence[Category] | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """`state_dict`, in the naming it came in, with a class head for the model's classes, and the names of those kept.

    A row of the source is kept where the class's name agrees, whatever the case; "no object" is always kept; the other
    rows are the model's own. Where either side's names are unknown and the sizes agree, the whole head is kept.
    """
    weights = NamedWeights.recognise(state_dict)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("class_embed.") and key in weights}
    unknown = source_categories is None or own_categories is None
    if unknown and all(weights[key].shape == value.shape for key, value in own.items()):
        return dict(weights.tensors), [category.name for category in source_categories or own_categories or ()]
    rows = {} if unknown else _agreeing_rows(source_categories or (), own_categories or ())
    head = {key: _fitted_rows(value, weights[key], [*rows.items(), (-1, -1)]) for key, value in own.items()}
    renamed = {counterparts(key, weights.naming)[0]: value for key, value in head.items()}
    return {**weights.tensors, **renamed}, [(own_categories or ())[row].name for row in rows]


def _agreeing_rows(source: Sequence[Category], own: Sequence[Category]) -> dict[int, int]:
    """Own row to source row of the classes whose names agree: the same row where it can be, as COCO has many "N/A"."""
    theirs = [category.name.casefold() for category in source]
    place = {name: row for row, name in enumerate(theirs)}
    names = [category.name.casefold() for category in own]
    return {
        row: row if name in theirs[row : row + 1] else place[name] for row, name in enumerate(names) if name in place
    }


def _fitted_rows(own: Tensor, source: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """`own` with `rows` of `source` in it; `source` itself where the rows are of another width, to be told later."""
    if own.shape[1:] != source.shape[1:]:
        return source
    fitted = own.clone()
    mine, theirs = (list(side) for side in zip(*rows, strict=True))
    fitted[mine] = source[theirs].to(own)
    return fitted


def read_categories(file: WeightsFile, num_classes: int | None) -> tuple[Category, ...] | None:
    """What each label of the file's detector stands for: as the file says it, else COCO's names for 91 classes."""
    if file.categories is not None:
        try:
            stated = tuple(Category(id=int(entry["id"]), name=str(entry["name"])) for entry in file.categories)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{file.path}: its categories are no list of ids and names.") from error
        if len(stated) > (num_classes or 0):
            raise UserError(f"{file.path}: it names {len(stated)} categories, its class head has {num_classes}.")
        return stated
    names = file.huggingface_config.get("id2label")
    if isinstance(names, dict) and names and not all(str(name).startswith("LABEL_") for name in names.values()):
        return tuple(Category(label, str(names.get(str(label), "N/A"))) for label in range(num_classes or 0))
    if num_classes == COCO_NUM_CLASSES and file.model_config is None:
        return coco_categories()
    return None


def coco_categories() -> tuple[Category, ...]:
    """COCO's classes by raw id, 0 to 90, as torchvision lists them; ids that COCO does not use are called N/A."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(Category(label, name) for label, name in enumerate(names))
