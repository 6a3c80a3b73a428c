"""Backends of a network's operations: chosen once by `detr_kernels`' registry, and handed to the modules.

A network that was handed nothing leaves the choice to every call.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from detr_kernels import OPERATIONS, Facts, Selection
from detr_kernels.registry import select
from torch import nn

from detr_fast.config import ModelConfig, UserError
from detr_fast.options import Attention, Kernels

OF_THE_LOSS = ("match_cost", "assignment", "set_loss")


class Selectable(nn.Module):
    """Runs operations of the registry, each on the backend that was chosen for it."""

    operations: ClassVar[tuple[str, ...]] = ()
    """Operations that it runs itself."""
    selection = Selection()

    def use(self, selection: Selection) -> None:
        self.selection = selection

    def backend(self, operation: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
        """Return the backend that was chosen for the mode, training or evaluation, that the module is in.

        Where none was chosen: "auto", or, for tensors of `dtype` on `device`, the backend that "auto" takes.
        """
        chosen = self.selection.backend(operation, self.training)
        if chosen != "auto" or device is None:
            return chosen
        facts = Facts(device, dtype, self.training, compiled=torch.compiler.is_compiling())
        return OPERATIONS[operation].choose(facts).backend


def selectable(root: nn.Module) -> Iterator[Selectable]:
    return (module for module in root.modules() if isinstance(module, Selectable))


def hand_out(selection: Selection, root: nn.Module) -> None:
    """Give every module of `root` its backends."""
    for module in selectable(root):
        module.use(selection)


def backends_asked(kernels: Kernels, attention: Attention) -> dict[str, str]:
    """Translate --kernels and --attention into a backend for each operation that they name.

    "ref" names the reference of all, "triton" our kernel where there is one; attention follows --kernels where
    --attention is auto.
    """
    named = {}
    for name, operation in OPERATIONS.items():
        wanted = attention if name == "attention" and attention != "auto" else kernels
        if wanted == "ref":
            named[name] = operation.reference
        elif wanted in operation.names:
            named[name] = wanted
    if named.get("convolution") == "triton":  # which does not run within these
        named |= {"residual_stage": "ref", "packed_convolution": "ref"}
    return named


def select_backends(
    network: nn.Module,
    kernels: Kernels = "auto",
    attention: Attention = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    named: Mapping[str, str] | None = None,
    measured: Mapping[str, tuple[str, str]] | None = None,
    compiled: bool = False,
) -> Selection:
    """Choose a backend for every operation on the device where `network` is, and hand them out.

    `dtype`: of GEMMs and convolutions. `named`: backends of single operations, before what --kernels and --attention
    ask for. `measured`: backend and reason of what won on this machine. Raises UserError where a backend that is asked
    for by name cannot run there.
    """
    config: ModelConfig = network.config  # type: ignore[assignment]
    facts = Facts(
        device=next(network.parameters()).device,
        dtype=dtype,
        dropout=config.dropout,
        head_dim=config.hidden_dim // config.num_heads,
        compiled=compiled,
    )
    try:
        selection = select(OPERATIONS, facts, backends_asked(kernels, attention) | dict(named or {}), measured)
    except RuntimeError as error:
        raise UserError(f"--kernels {kernels} --attention {attention}: {error}") from error
    hand_out(selection, network)
    return selection


def operations_of(network: nn.Module) -> set[str]:
    """Name the operations that `network` and its loss run, in training or in inference."""
    names = {name for module in selectable(network) for name in module.operations}
    names |= {"preprocessing", *OF_THE_LOSS}
    return names if network.config.dropout else names - {"dropout"}  # type: ignore[union-attr]


def reasons(network: nn.Module, selection: Selection, training: bool) -> dict[str, str]:
    """List what runs and why, for the operations of `network` and its loss: "layer norm" -> "ref (...)".

    A long reason is said once, and named after its first operation from then on.
    """
    own = operations_of(network)
    chosen, elsewhere = (selection.training, "inference") if training else (selection.inference, "training")
    here = [operation for name in chosen if name in own and (operation := OPERATIONS[name]).mode != elsewhere]
    lines: dict[str, str] = {}
    first: dict[str, str] = {}
    for operation in here:
        choice = chosen[operation.name]
        before = first.setdefault(choice.reason, operation.title)
        again = choice if before == operation.title else choice._replace(reason=f"as {before}")
        lines[operation.title] = min(str(choice), str(again), key=len)
    return lines
