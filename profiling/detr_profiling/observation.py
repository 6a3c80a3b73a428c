"""A model's outputs, losses, matches and gradients under names that every implementation shares, to be compared."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.cuda_graphs import Capturer
from detr_fast.data.batch import Batch
from detr_fast.detector import evaluation_mode
from detr_fast.model.detr import DETR, Predictions
from detr_fast.preprocessing import Preprocessing
from detr_fast.runtime import Runtime
from detr_fast.training.criterion import SetCriterion
from detr_fast.training.graphed_step import GraphedStep
from detr_fast.training.matcher import match
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep
from detr_profiling.measuring.timing import STEADY_AFTER

OUTPUTS = ("logits", "boxes")
Observation = dict[str, Tensor]
"""On the CPU: `logits` (L, B, Q, C+1) and `boxes` (L, B, Q, 4) cxcywh of the decoder's layers; where gradients are
enabled also each `loss...` term, `matches` (L, B, T) int64 query of each target, -1 for none, and `gradient NAME` of
each trained parameter under our name. Of an inference, L is 1.

Where the encoder proposes, also `logits of proposals` (1, B, N, C), `boxes of proposals` and `matches of proposals`."""


def observe_model(model: DETR, forward: Any, criterion: SetCriterion, batch: Batch, runtime: Runtime) -> Observation:
    """Observe what `forward` computes from a batch on its device, without dropout: a training step's `forward`, or
    where gradients are disabled what a detector calls."""
    images, mask = Preprocessing.of(model, runtime)(batch)
    with evaluation_mode(model):
        with runtime.autocast():
            outputs = forward(images, mask)
        if not torch.is_grad_enabled():
            return in_token_order(on_host(stacked_layers([outputs]) | proposals(outputs)))
        predictions: Predictions = outputs
        terms = criterion(predictions, batch.targets)
        found = {"logits": predictions.logits, "boxes": predictions.boxes_cxcywh}
        found["matches"], _ = match(predictions, batch.targets, criterion.costs, criterion.selection)
        if predictions.proposals is not None:
            matches, _ = match(predictions.proposals, batch.targets, criterion.costs, criterion.selection)
            found |= proposals(predictions.to_dict()) | {"matches of proposals": matches}
        return in_token_order(on_host(found | losses(terms) | named_gradients(model, terms["loss"])))


def observe_captured_step(
    model: DETR, criterion: SetCriterion, batch: Batch, runtime: Runtime, capturer: Capturer | None = None
) -> Observation:
    """Observe losses and gradients as the replay of a captured training step leaves them, without dropout.

    Neither weights nor what lies in `.grad` change: the learning rate is 0. `capturer`: default, CUDA graphs.
    """
    before = {parameter: parameter.grad for parameter in model.parameters()}
    step = TrainStep(model, criterion, build_optimizer(model, 0.0, 0.0, weight_decay=0.0), runtime, clip=0.0)
    graphed = GraphedStep(MicroBatches(step), capturer)
    with evaluation_mode(model), torch.enable_grad():
        for _ in range(STEADY_AFTER["cuda"]):
            terms = graphed([batch])
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = on_host(
        losses(terms) | {f"gradient {our_name(name)}": each for name, each in named.items() if each is not None}
    )
    for parameter, gradient in before.items():
        parameter.grad = gradient
    return found


def on_host(found: Observation) -> Observation:
    return {name: value.detach().cpu() for name, value in found.items()}


def stacked_layers(layers: Sequence[dict[str, Any]]) -> Observation:
    """Stack the outputs of several decoder layers, first to last."""
    names = {"logits": "pred_logits", "boxes": "pred_boxes"}
    return {name: torch.stack([layer[key] for layer in layers]) for name, key in names.items()}


def proposals(outputs: dict[str, Any]) -> Observation:
    """Name what the encoder's tokens propose, as one layer; nothing where they propose nothing."""
    found = stacked_layers([outputs["enc_outputs"]]) if "enc_outputs" in outputs else {}
    return {f"{name} of proposals": value for name, value in found.items()}


def token_order(found: Observation) -> Tensor | None:
    """Return the numbers (B, Q) of the queries in the order of the tokens that they are; None where they are none."""
    if "logits of proposals" not in found:
        return None
    return found["logits of proposals"][0].amax(-1).topk(found["logits"].shape[2]).indices.argsort(-1)


def in_token_order(found: Observation) -> Observation:
    """Number queries that are tokens in the order of the tokens: of two with nearly the same score, rounding decides
    which is the first."""
    order = token_order(found)
    if order is None:
        return found
    kept = {name: torch.stack([layer.take_along_dim(order[..., None], 1) for layer in found[name]]) for name in OUTPUTS}
    if "matches" in found:
        number, matches = order.argsort(-1), found["matches"]
        moved = torch.stack([number.gather(1, layer.clamp(min=0)) for layer in matches])
        kept["matches"] = torch.where(matches >= 0, moved, -1)
    return found | kept


def losses(terms: dict[str, Tensor]) -> Observation:
    return {name: value for name, value in terms.items() if name.startswith("loss")}


def named_gradients(model: nn.Module, loss: Tensor) -> Observation:
    """Name each trained parameter's `gradient NAME`, as `our_name` has it."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    return {f"gradient {our_name(name)}": value for name, value in zip(trained, gradients, strict=True)}


def our_name(name: str) -> str:
    """Name a module or parameter alike in ours and in the reference, without what holds a backbone."""
    return re.sub(r"^backbone\.(0\.)?(body\.)?", "backbone.", name)
