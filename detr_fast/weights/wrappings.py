"""Search for the weights in a file, under any key, and removal of what wrappers put before their names."""

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
EMA_WORDS = re.compile(r"(^|_)(ema|swa|avg|averag[a-z]*|shadow)(_|$)")
NO_WEIGHTS = re.compile(r"(^|_)(exp_avg|moments?|momentum(_buffers?)?$|grads?|gradients?|optim|optimizers?)(_|$)")
"""Words of keys under which an optimizer keeps tensors by the names of weights."""
DEEPEST = 4

WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a name that DataParallel, torch.compile and their like add, at any place."""
BESIDE_THE_MODEL = ("criterion.", "n_averaged")
"""Names that DETR's loss and torch's AveragedModel register: dropped without a word."""


@dataclass(frozen=True)
class Found:
    """A state dict found in a file's content."""

    tensors: dict[str, Tensor]
    keys: tuple[str, ...] = ()
    """The keys that lead to it."""
    passed_over: tuple[tuple[str, ...], ...] = ()
    """Keys of other state dicts with the same names, if nothing says which is meant."""

    @property
    def is_ema(self) -> bool:
        return any(says(EMA_WORDS, key) for key in self.keys)


def says(what: re.Pattern[str], key: str) -> bool:
    """Tell whether `what` is among the words of a key, however they are joined: modelEMA and model_ema are the same."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)
    return what.search("_".join(words).lower()) is not None


def find_weights(content: Any) -> Found:
    """Find the state dict in `content`: whole EMA weights, else those under a usual key, else the largest.

    Raises UserError that says what is there instead.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {brief(type(content).__name__)}, not a state dict: save model.state_dict() instead.")
    found = list(state_dicts(content))
    if not found:
        raise UserError(f"holds no weights{what_else(content)}: save model.state_dict() in it.")
    trained = [one for one in found if not one.is_ema] or found
    most = max(len(one.tensors) for one in trained)

    def order(one: Found) -> tuple[int, int]:
        key = one.keys[-1] if one.keys else ""
        usual = key in PREFERRED and 2 * len(one.tensors) >= most
        return PREFERRED.index(key) if usual else len(PREFERRED), -len(one.tensors)

    chosen = min(trained, key=order)
    ema = [one for one in found if one.is_ema and len(one.tensors) >= len(chosen.tensors)]
    if ema:
        return min(ema, key=order)
    if order(chosen)[0] < len(PREFERRED):
        return chosen
    rivals = (one.keys for one in trained if one is not chosen and one.tensors.keys() == chosen.tensors.keys())
    return replace(chosen, passed_over=tuple(rivals))


def state_dicts(content: Mapping[Any, Any]) -> Iterator[Found]:
    """Yield every dictionary in `content` that holds tensors under names, each once, without an optimizer's."""
    seen: set[int] = set()
    waiting: list[tuple[Mapping[Any, Any], tuple[str, ...]]] = [(content, ())]
    for values, keys in waiting:  # grows meanwhile
        if id(values) in seen or "param_groups" in values or len(keys) > DEEPEST:
            continue
        seen.add(id(values))
        named = [(key, value) for key, value in values.items() if isinstance(key, str)]
        if tensors := {key: tensor for key, value in named if (tensor := as_tensor(value)) is not None}:
            yield Found(tensors, keys)
        inner = [(key, value) for key, value in named if isinstance(value, dict) and not says(NO_WEIGHTS, key)]
        waiting += [(value, (*keys, key)) for key, value in inner]


def as_tensor(value: Any) -> Tensor | None:
    """Return `value` as a dense tensor of its own numbers, where it is a tensor or a pickled array."""
    if isinstance(value, NumpyArray):
        return None if value.values is None else torch.from_numpy(value.values)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return None
    return value.dequantize() if value.is_quantized else value


def what_else(content: Mapping[Any, Any]) -> str:
    """Describe the content of a file without weights."""
    if not content:
        return ", it is an empty dictionary"
    if "param_groups" in content:
        return ", only an optimizer's state"
    kinds = (f"{key!r} ({type(value).__name__})" for key, value in content.items())
    return f", its keys are {listed(kinds)}"


def without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from names the parts that wrappers add; keep all names where two would become one."""
    renamed = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): value for name, value in state_dict.items()
    }
    return renamed if len(renamed) == len(state_dict) else dict(state_dict)


def prefix_of(names: Iterable[str], anchors: Iterable[str]) -> str | None:
    """Find the prefix of the first of `anchors` that ends any of `names`; None where none does.

    Of several it is the EMA weights', where these are whole, else a usual key, else the shortest.
    """
    names = list(names)
    for anchor in anchors:
        ending = (name[: -len(anchor)] for name in names if name == anchor or name.endswith(f".{anchor}"))
        prefixes = {prefix for prefix in ending if not says(NO_WEIGHTS, prefix)}
        if prefixes:
            held = Counter(prefix for name in names if (prefix := nearest(name, prefixes)) is not None)
            most = max(held.values())
            ema = {prefix for prefix in prefixes if says(EMA_WORDS, prefix)}
            whole = {prefix for prefix in ema if held[prefix] == most}
            return min(whole or prefixes - ema or ema, key=lambda it: (not usual(it), len(it), it))
    return None


def usual(prefix: str) -> bool:
    return prefix.removesuffix(".").rpartition(".")[2] in PREFERRED


def nearest(name: str, prefixes: Container[str]) -> str | None:
    """Return the longest of `prefixes` that a name of the model's own follows in `name`."""
    ends = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
    found = next((name[:end] for end in reversed(ends) if name[:end] in prefixes), None)
    return None if found is None or name.removeprefix(found).startswith(BESIDE_THE_MODEL) else found


def unwrapped(state_dict: Mapping[str, Tensor], anchors: Iterable[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the model's tensors under its own names, and the names of tensors that are not its.

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
