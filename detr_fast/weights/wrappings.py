"""Weights as people keep them: under which key of a file they lie, and what wrappers put before their names."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from detr_fast.config import UserError
from detr_fast.weights.pickles import NumpyArray, brief, listed

PREFERRED = ("model", "model_state_dict", "state_dict", "net", "network", "student")
"""Keys to look at first, where several hold as much."""
AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averag[a-z]*|shadow)(_|$)")
NO_WEIGHTS = re.compile(r"(^|_)(exp_avg|moments?|momentum(_buffers?)?$|grads?|gradients?|optim|optimizers?)(_|$)")
"""Words of keys under which an optimizer keeps tensors by the names of weights."""
DEEPEST = 4

WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a name that DataParallel, torch.compile and their like add, at any place."""
BESIDE_THE_MODEL = ("criterion.", "n_averaged")
"""Names that DETR's loss and torch's AveragedModel register: dropped without a word."""


@dataclass(frozen=True)
class Found:
    """A state dict in what a file holds."""

    tensors: dict[str, Tensor]
    place: tuple[str, ...] = ()
    """The keys that lead to it."""
    passed_over: tuple[tuple[str, ...], ...] = ()
    """Where the same names are as well, if nothing says which of them are meant."""

    @property
    def averaged(self) -> bool:
        return any(says(AVERAGED, key) for key in self.place)


def says(what: re.Pattern[str], key: str) -> bool:
    """Tell whether `what` is among the words of a key, however they are joined: modelEMA and model_ema are the same."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)
    return what.search("_".join(words).lower()) is not None


def find_weights(content: Any) -> Found:
    """Find the state dict in `content`, wherever it lies: averaged weights (EMA) where they are whole, else what lies
    under a usual key, else the one with the most tensors. Raises UserError that says what is there instead."""
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {brief(type(content).__name__)}, not a state dict: save model.state_dict() instead.")
    found = list(state_dicts(content))
    if not found:
        raise UserError(f"holds no weights{what_else(content)}: save model.state_dict() in it.")
    trained = [one for one in found if not one.averaged] or found
    most = max(len(one.tensors) for one in trained)

    def order(one: Found) -> tuple[int, int]:
        key = one.place[-1] if one.place else ""
        usual = key in PREFERRED and 2 * len(one.tensors) >= most
        return PREFERRED.index(key) if usual else len(PREFERRED), -len(one.tensors)

    chosen = min(trained, key=order)
    averaged = [one for one in found if one.averaged and len(one.tensors) >= len(chosen.tensors)]
    if averaged:
        return min(averaged, key=order)
    if order(chosen)[0] < len(PREFERRED):
        return chosen
    rivals = (one.place for one in trained if one is not chosen and one.tensors.keys() == chosen.tensors.keys())
    return replace(chosen, passed_over=tuple(rivals))


def state_dicts(content: Mapping[Any, Any]) -> Iterator[Found]:
    """Yield every dictionary in `content` that holds tensors under names, each once, without an optimizer's."""
    seen: set[int] = set()
    waiting: list[tuple[Mapping[Any, Any], tuple[str, ...]]] = [(content, ())]
    for values, place in waiting:  # grows meanwhile
        if id(values) in seen or "param_groups" in values or len(place) > DEEPEST:
            continue
        seen.add(id(values))
        named = [(key, value) for key, value in values.items() if isinstance(key, str)]
        if tensors := {key: tensor for key, value in named if (tensor := as_tensor(value)) is not None}:
            yield Found(tensors, place)
        inner = [(key, value) for key, value in named if isinstance(value, dict) and not says(NO_WEIGHTS, key)]
        waiting += [(value, (*place, key)) for key, value in inner]


def as_tensor(value: Any) -> Tensor | None:
    """Return `value` as a dense tensor of its own numbers, where it is a tensor or a pickled array."""
    if isinstance(value, NumpyArray):
        return None if value.values is None else torch.from_numpy(value.values)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return None
    return value.dequantize() if value.is_quantized else value


def what_else(content: Mapping[Any, Any]) -> str:
    """Say what a file without weights holds."""
    if not content:
        return ", it is an empty dictionary"
    if "param_groups" in content:
        return ", only an optimizer's state"
    kinds = (f"{key!r} ({type(value).__name__})" for key, value in content.items())
    return f", its keys are {listed(kinds)}"


def without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the parts of their names that wrappers add; as they are where two would become one."""
    renamed = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in state_dict.items()
    }
    return renamed if len(renamed) == len(state_dict) else dict(state_dict)


def prefix_of(names: Iterable[str], anchors: Iterable[str]) -> str | None:
    """Return what stands before the first of `anchors` that ends any of `names`: averaged weights' where there are
    several and these hold as much, else a usual key, else the shortest. None where no name ends so."""
    names = list(names)
    for anchor in anchors:
        ending = (name[: -len(anchor)] for name in names if name == anchor or name.endswith(f".{anchor}"))
        prefixes = {prefix for prefix in ending if not says(NO_WEIGHTS, prefix)}
        if prefixes:
            held = Counter(prefix for name in names if (prefix := nearest(name, prefixes)) is not None)
            most = max(held.values())
            averaged = {prefix for prefix in prefixes if says(AVERAGED, prefix)}
            whole = {prefix for prefix in averaged if held[prefix] == most}
            return min(whole or prefixes - averaged or averaged, key=lambda it: (not usual(it), len(it), it))
    return None


def usual(prefix: str) -> bool:
    return prefix.removesuffix(".").rpartition(".")[2] in PREFERRED


def nearest(name: str, prefixes: Container[str]) -> str | None:
    """Return the longest of `prefixes` that a name of the model's own follows in `name`."""
    ends = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    found = next((name[:end] for end in reversed(ends) if name[:end] in prefixes), None)
    return None if found is None or name.removeprefix(found).startswith(BESIDE_THE_MODEL) else found


def unwrapped(state_dict: Mapping[str, Tensor], anchors: Iterable[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors under the names that the model itself gives them, and the names of those that are not its.

    `anchors` are names that such a model has, in order of preference; what precedes them is taken off.
    """
    plain = without_wrappers(state_dict)
    prefix = prefix_of(plain, anchors) or ""
    inside = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
    outside = [name for name in plain if not name.startswith(prefix)]
    return (
        {name: value for name, value in inside.items() if not name.startswith(BESIDE_THE_MODEL)},
        tuple(name for name in outside if not name.startswith(BESIDE_THE_MODEL)),
    )
