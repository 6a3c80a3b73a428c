"""Categories and labels: which class each label stands for, and categories that are the same but for their spelling."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from detr_fast.config import UserError, require
from detr_fast.data.annotations import Annotations, Category
from detr_fast.data.corrections import shortened

UNUSED = "N/A"
"""The name of a label that no category of the data has."""


class UnknownCategories(UserError):
    """Raised for data with categories that the model does not know."""

    def __init__(self, message: str, file: Path, unknown: Sequence[Category]) -> None:
        super().__init__(message)
        self.file = file
        self.unknown = unknown


def choose_categories(
    annotations: Annotations, categories: Sequence[Category] | None, raw_ids: bool, num_classes: int | None
) -> tuple[Category, ...] | None:
    """Choose what each label stands for; None: labels are the ids, and their names are not known.

    `num_classes` above all ids makes labels the ids, too, with names. Raises UserError for a number between that and
    how many classes there are: some labels would stand for nothing.
    """
    if raw_ids:
        return None
    if categories is not None:
        return tuple(categories)
    own, largest = tuple(annotations.categories), annotations.categories[-1].id
    if num_classes is None or num_classes == len(own):
        return own
    require(
        num_classes > largest,
        f"--num-classes {num_classes}: the data has {len(own)} classes, with ids up to {largest}. "
        f"Leave the option out, or give at least {largest + 1} to use the ids as labels.",
    )
    name_of = {category.id: category.name for category in own}
    return tuple(Category(label, name_of.get(label, UNUSED)) for label in range(num_classes))


def label_map(annotations: Annotations, categories: Sequence[Category] | None) -> dict[int, int]:
    """Map category ids to labels: the index in `categories`, or the id itself.

    Raises UserError for a category that annotations use and `categories` lack.
    """
    if categories is None:
        return {category.id: category.id for category in annotations.categories}
    used = set(annotations.category_ids.tolist())
    known = set(categories)
    unknown = [category for category in annotations.categories if category.id in used and category not in known]
    if unknown:
        hint = spelling_hint(unknown, by_spelling(categories))
        raise UnknownCategories(
            f"{annotations.file}: the model does not know these categories: {names(unknown)}. "
            f"It knows {names(categories)}. Give data with the same ids and names.{hint}",
            annotations.file,
            unknown,
        )
    return {category.id: label for label, category in enumerate(categories)}


def names(categories: Sequence[Category]) -> str:
    return shortened(categories, 10)


def by_spelling(categories: Sequence[Category]) -> dict[str, Category]:
    return {spelling(category.name): category for category in categories}


def spelling_hint(unknown: Sequence[Category], known: Mapping[str, Category]) -> str:
    """Write a sentence on categories that differ from `known` in id, case or spaces alone; "" where there are none."""
    pairs = [(one, known[spelling(one.name)]) for one in unknown if spelling(one.name) in known]
    alike = [f"{one} and {other}" for one, other in pairs]
    return f" These differ in id, case or spaces alone: {shortened(alike, 5)}." if alike else ""


def spelling(name: str) -> str:
    """Return the name without case, and with single spaces."""
    return " ".join(name.split()).casefold()
