"""The registry of operations: which backends each has, where each can run, and the one function that chooses.

Each operation is declared beside its kernels, as `OPERATION = Operation(...)` in the file of its public function;
`detr_kernels.operations` lists them all. What chooses, prints, measures, compiles ahead or counts asks this list.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

Shape = Sequence[int]


class Facts(NamedTuple):
    """Where and how an operation is to run: everything that a choice among its backends depends on."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Dtype in which it computes: autocast's where that is on, else the weights'."""
    training: bool = False
    """Dropout is on and gradients are wanted."""
    dropout: float = 0.0
    """Probability with which the network drops entries in training."""
    head_dim: int = 32
    """Width of an attention head."""
    compiled: bool = False
    """torch.compile traces the network."""


class Choice(NamedTuple):
    """A backend and why it runs; its text is what is printed."""

    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


def never_refused(facts: Facts) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an operation."""

    name: str
    why_not: Callable[[Facts], str | None] = never_refused
    """Says why it cannot run there and what would help; None where it can."""
    only_by_name: Callable[[Facts], str | None] = never_refused
    """Says why `auto` leaves it to those who ask for it by name or measure; None where it does not."""
    reason: str = ""
    """Why `auto` prefers it to those after it."""


@dataclass(frozen=True)
class Operation:
    """An operation that has several backends which compute the same, up to rounding and random numbers."""

    name: str
    """Its name in options, reasons, tuned entries and the ladder."""
    backends: tuple[Backend, ...]
    """Backends in the order in which `auto` prefers them; the last is the plain reference, which runs everywhere."""
    mode: Literal["training", "inference"] | None = None
    """The only mode in which it runs; None: it runs in both."""
    flop: Mapping[str, Callable[..., int]] = field(default_factory=dict)
    """Custom operator (detr_kernels::...) -> formula of its floating-point operations, from the shapes of its tensor
    arguments as they come and `out_shape`; operators that multiply no matrices count none."""
    specimens: Callable[[], None] | None = None
    """Makes every Triton launch at DETR's shapes, on tensors of the meta device; None: it launches none."""

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def reference(self) -> str:
        return self.backends[-1].name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(backend.name for backend in self.backends)

    def why_not(self, backend: str, facts: Facts) -> str | None:
        """Say why `backend` cannot run there; None where it can. Raises ValueError for a name that it does not have."""
        for each in self.backends:
            if each.name == backend:
                return each.why_not(facts)
        raise ValueError(f"{self.title}: backend must be auto, {', '.join(self.names)}, not {backend!r}")

    def choose(self, facts: Facts, asked: str = "auto") -> Choice:
        """Choose the backend to run: the one asked for by name, or the first that can and that `auto` may take.

        Raises RuntimeError where the one asked for cannot run, and ValueError for an unknown name.
        """
        if asked != "auto":
            problem = self.why_not(asked, facts)
            if problem:
                raise RuntimeError(f"{self.title} by {asked}: {problem}. Or ask for auto.")
            return Choice(asked, "asked for")
        impossible = left_alone = ""
        for each in self.backends:
            if problem := each.why_not(facts):
                impossible = impossible or f"not {each.name}: {problem}"
            elif problem := each.only_by_name(facts):
                left_alone = left_alone or f"not {each.name}: {problem}"
            else:
                return Choice(each.name, each.reason or left_alone or impossible or "the only one")
        raise RuntimeError(f"{self.title}: no backend runs here; {impossible}")


@dataclass(frozen=True)
class Selection:
    """The backend of every operation of one network, in training and in inference.

    An empty one leaves each call to choose by its own tensors: a network that was placed nowhere.
    """

    training: Mapping[str, Choice] = field(default_factory=dict)
    inference: Mapping[str, Choice] = field(default_factory=dict)

    @classmethod
    def named(cls, **backends: str) -> "Selection":
        """Take these backends in both modes, unasked whether they can run; leave the others to each call."""
        choices = {operation: Choice(backend, "asked for") for operation, backend in backends.items()}
        return cls(choices, choices)

    def backend(self, operation: str, training: bool = False) -> str:
        """Return the name to hand to the operation's function: what was chosen, or "auto"."""
        chosen = (self.training if training else self.inference).get(operation)
        return "auto" if chosen is None else chosen.backend


def select(
    operations: Mapping[str, Operation],
    facts: Facts,
    asked: Mapping[str, str] | None = None,
    measured: Mapping[str, tuple[str, str]] | None = None,
) -> Selection:
    """Choose for every operation, in training and in inference.

    `asked`: backends asked for by name; one that runs in one of the two alone leaves the other to `auto`. `measured`:
    backend and reason of what won on this machine, used where nothing was asked for. Raises RuntimeError where a
    backend that is asked for runs in neither, and ValueError for an operation that there is not.
    """
    if unknown := sorted({*(asked or {})} - {*operations}):
        raise ValueError(f"{', '.join(unknown)}: no such operation; there are {', '.join(operations)}")
    modes = facts._replace(training=True), facts._replace(training=False, dropout=0.0)
    chosen: tuple[dict[str, Choice], dict[str, Choice]] = ({}, {})
    for name, operation in operations.items():
        wanted = (asked or {}).get(name, "auto")
        runs = [wanted == "auto" or operation.why_not(wanted, mode) is None for mode in modes]
        for into, mode, can in zip(chosen, modes, runs, strict=True):
            into[name] = operation.choose(mode, wanted if can or not any(runs) else "auto")
            if wanted == "auto" and measured and name in measured:
                backend, reason = measured[name]
                if operation.why_not(backend, mode) is None:
                    into[name] = Choice(backend, reason)
    return Selection(*chosen)


def zero_flop(*shapes: Any, **_: Any) -> int:
    """Return the GEMM FLOP of an operator that multiplies no matrices: 0."""
    return 0
