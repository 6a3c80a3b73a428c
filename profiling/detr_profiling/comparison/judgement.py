"""Verdicts on whether what an implementation computed is what the plain reference computes, quantity by quantity.

Every verdict is `closeness`'s: an error against the reference in float64, at most twice the error of the reference in
the same precision, plus one of three absolute tolerances. One number's error is luck, and so is the largest of a
million. So errors are distances of vectors (a token, a query, a parameter's gradient) relative to their size, and the
largest distance counts.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from detr_profiling.comparison.closeness import Closeness, closeness, scaled_tolerance
from detr_profiling.comparison.own_outputs import (
    PROPOSALS,
    SIGMOID,
    TARGET_KEYS,
    cost_of_matches,
    losses_from_outputs,
    targets_of,
)
from detr_profiling.observation import Observation

__all__ = ["Row", "judge", "targets_of", "worst"]

Kind = Literal["block", "output", "loss", "gradient", "match", "update"]

FORWARD = 2e-5
"""Relative, of all that a forward pass gives: blocks, outputs, losses, costs of matches. Two hundred roundings of
float32: convolutions sum up to 4,608 products, in any order, fifty times in a row, and losses add their outputs'."""
STEP = 3e-3
"""Tolerance of quantities that are one number each: a scale along the exact value, or the effect of an optimizer step.
bf16 moves a scale by 1e-3; one ReLU that tips over moves a gradient's by 6e-4."""
GRADIENT = 2e-2
"""Tolerance of a gradient's relative distance: each of the thousands of ReLUs that carry it may be at its kink, and
then passes it or does not."""
SMALL_GRADIENT = 1e-3
"""Least norm by which a gradient's error is divided, as a fraction of its group's norm. Some gradients are zero but for
rounding, since the decoder starts from zeros, and their relative error says nothing."""
GROUPS = (
    (r"backbone\.layers?\.?\d", None),
    (r"backbone", "backbone"),
    (r"input_(?:proj|norm)|transformer\.encoder", "encoder"),
    (r"query_(?:embed|boxes|position|selection)|transformer\.decoder", "decoder"),
    (r"class_embed|bbox_embed", "heads"),
)
"""Parameter names to the rows that they are reported in; None: what matched is the name."""


@dataclass(frozen=True)
class Row:
    """Holds the verdict on one quantity."""

    quantity: str
    kind: Kind
    error: float
    """Relative, but of matches, which is a cost. NaN: missing, or not finite."""
    eager_error: float
    allowed: float
    close: bool

    @classmethod
    def of(cls, quantity: str, kind: Kind, judged: Closeness) -> Self:
        return cls(quantity, kind, judged.error, judged.eager_error, judged.allowed, judged.close)

    @classmethod
    def of_errors(cls, quantity: str, kind: Kind, errors: Tensor, eager_errors: Tensor, tolerance: float) -> Self:
        """Make a row of errors that are computed already."""
        return cls.of(quantity, kind, closeness(errors, torch.zeros_like(errors), eager_errors, tolerance, quantity))

    @classmethod
    def missing(cls, quantity: str, kind: Kind) -> Self:
        """Make the row of a quantity that one side lacks."""
        return cls(quantity, kind, math.nan, math.nan, math.nan, False)

    @property
    def fraction_used(self) -> float:
        """Return the fraction of what is allowed; infinite where no number says by how much it is too far."""
        if self.close and self.error == 0:
            return 0.0
        return self.error / self.allowed if math.isfinite(self.error) and self.allowed > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Make a dict in which NaN and infinity, which JSON does not have, are None."""
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        return asdict(self) | {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def worst(rows: Iterable[Row]) -> Row:
    """Find the row that is nearest to what is allowed, or furthest past it."""
    return max(rows, key=lambda row: (not row.close, row.fraction_used))


def judge(found: Observation, reference: Observation, eager: Observation) -> list[Row]:
    """Judge `found` by the reference in float64, `reference`, and by the reference in found's precision, `eager`.

    All three hold the same quantities: one that is missing on a side is not close. Matches, and losses by
    themselves, are judged where `reference` also holds the targets (`reference | targets_of(options)`).
    """
    sides = (found, reference, eager)
    names = list(dict.fromkeys(name for side in sides for name in side if name not in (*TARGET_KEYS, SIGMOID)))
    rows = [Row.missing(name, kind_of(name)) for name in names if any(name not in side for side in sides)]
    shared = [name for name in names if all(name in side for side in sides)]
    kinds = {kind: [name for name in shared if kind_of(name) == kind] for kind in Kind.__args__}  # type: ignore[attr-defined]
    features = kinds["block"] + kinds["output"]
    rows += [judge_vectors(name, *sides) for name in features]
    if features:
        rows.append(judge_scales(features, *sides))
    if kinds["loss"]:
        rows.append(judge_losses("losses", "loss", kinds["loss"], *sides))
        if kinds["match"] and all(key in reference for key in TARGET_KEYS):
            rows += judge_own_losses(kinds["loss"], *sides)
            rows += [judge_matches(name.removeprefix("matches"), *sides) for name in kinds["match"]]
    return rows + list(judge_gradients(kinds["gradient"], *sides)) + list(judge_update(kinds["update"], *sides))


def kind_of(name: str) -> Kind:
    """Tell the kind of an observation's quantity."""
    if name.removesuffix(PROPOSALS) in ("logits", "boxes"):
        return "output"
    prefixes: dict[str, Kind] = {"matches": "match", "loss": "loss", "gradient ": "gradient", "update ": "update"}
    return next((kind for prefix, kind in prefixes.items() if name.startswith(prefix)), "block")


def judge_vectors(name: str, found: Observation, reference: Observation, eager: Observation) -> Row:
    """Judge the distance of each vector (..., D), such as a token, relative to the vectors' root mean square length."""
    exact = reference[name].double()
    length = exact.norm(dim=-1).square().mean().sqrt().clamp(min=1e-30)
    ours, plain = ((side[name].double() - exact).norm(dim=-1) / length for side in (found, eager))
    kind = kind_of(name)
    return Row.of_errors(name.removeprefix("block "), kind, ours, plain, FORWARD)


def judge_scales(names: Sequence[str], found: Observation, reference: Observation, eager: Observation) -> Row:
    """Judge how much longer or shorter each quantity is along the exact one.

    Rounding has no direction and hides little of it: what is off by 1 % shows in bf16 too.
    """
    ours, plain = (torch.stack([off_scale(side[name], reference[name]) for name in names]) for side in (found, eager))
    return Row.of_errors("scale of blocks and outputs", "output", ours, plain, STEP)


def off_scale(x: Tensor, reference: Tensor) -> Tensor:
    """Compute |<x, reference> / <reference, reference> - 1|."""
    exact = reference.double().flatten()
    return (x.double().flatten() @ exact / (exact @ exact).clamp(min=1e-30) - 1).abs()


def judge_losses(
    quantity: str, kind: Kind, names: Sequence[str], found: Observation, reference: Observation, eager: Observation
) -> Row:
    """Judge all terms end to end, each relative to itself."""
    exact = torch.stack([reference[name].double() for name in names])
    ours, plain = (
        (torch.stack([side[name].double() for name in names]) - exact).abs() / exact.abs().clamp(min=1e-9)
        for side in (found, eager)
    )
    return Row.of_errors(quantity, kind, ours, plain, FORWARD if kind == "loss" else STEP)


def judge_own_losses(
    names: Iterable[str], found: Observation, reference: Observation, eager: Observation
) -> Iterator[Row]:
    """Judge each term by what the reference makes of the same outputs and matches."""
    exact, of_eager = losses_from_outputs(found, reference), losses_from_outputs(eager, reference)
    for name in names:
        rough = exact[name] + (eager[name].double() - of_eager[name])
        judged = closeness(found[name], exact[name], rough, scaled_tolerance(exact[name], FORWARD), name)
        yield Row.of(f"{name}, from its outputs", "loss", judged)


def judge_matches(of: str, found: Observation, reference: Observation, eager: Observation) -> Row:
    """Judge by how much the matches cost more than the cheapest ones, by the outputs that they were made from."""
    (ours, largest), (plain, _) = (cost_of_matches(side, reference, of) for side in (found, eager))
    return Row.of_errors(f"matches{of}, cost above the least", "match", ours, plain, FORWARD * largest)


def judge_gradients(
    names: Iterable[str], found: Observation, reference: Observation, eager: Observation
) -> Iterator[Row]:
    """Judge the root mean square of the parameters' relative errors, by group and of all parameters.

    Judges too how much longer or shorter any parameter's gradient is along the exact one: there a single gradient
    that is missing or wrong shows.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name.removeprefix("gradient ")), []).append(name)
    if not groups:
        return
    squares, scales = torch.zeros(3, dtype=torch.float64), []
    for group, members in groups.items():
        sides = zip(*(compare_gradients(name, found, reference, eager) for name in members), strict=True)
        own, ours, plain, along = (torch.tensor(values, dtype=torch.float64) for values in sides)  # (P,)
        size = own.clamp(min=max(SMALL_GRADIENT * own.norm().item(), 1e-30))
        error, rough = (side.div(size).square().mean().sqrt() for side in (ours, plain))
        yield Row.of_errors(f"gradients of {group}", "gradient", error, rough, GRADIENT)
        squares += torch.stack((own, ours, plain)).square().sum(1)
        scales.append(torch.stack((along / size**2, plain / size)))
    own, ours, plain = squares.sqrt()
    yield Row.of_errors("gradients of all", "gradient", ours / own, plain / own, GRADIENT)
    ours, plain = torch.cat(scales, 1).abs()
    # how much of eager's rounding lies along the reference is luck: all of it could
    yield Row.of_errors("scale of gradients", "gradient", ours, plain, STEP)


def compare_gradients(name: str, found: Observation, reference: Observation, eager: Observation) -> list[float]:
    """Return the exact gradient's norm, the distances of `found` and of `eager` to it, and the first one's part along
    it times its norm."""
    exact = reference[name].double().flatten()
    ours, plain = (side[name].double().flatten() - exact for side in (found, eager))
    return [value.item() for value in (exact.norm(), ours.norm(), plain.norm(), ours @ exact)]


def group_of(parameter: str) -> str:
    for pattern, group in GROUPS:
        if matched := re.match(pattern, parameter):
            return group or matched[0]
    return "the rest"


def judge_update(names: Sequence[str], found: Observation, reference: Observation, eager: Observation) -> Iterator[Row]:
    """Judge an optimizer step: the losses after it, and how far each group's update goes down the exact gradient."""
    losses = [name for name in names if name.startswith("update loss")]
    if losses:
        yield judge_losses("losses after a step", "update", losses, found, reference, eager)
    for name in names:
        if name not in losses:
            ours, plain = off_scale(found[name], reference[name]), off_scale(eager[name], reference[name])
            yield Row.of_errors(name, "update", ours, plain, STEP)
