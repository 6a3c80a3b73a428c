"""A model's outputs, losses, matches and gradients under names that every implementation shares, to be compared."""

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

Observation = dict[str, Tensor]
"""On the CPU: `logits` (L, B, Q, C+1) and `boxes` (L, B, Q, 4) cxcywh of the decoder's layers; where gradients are
enabled also each `loss...` term, `matches` (L, B, T) int64 query of each target, -1 for none, and `gradient NAME` of
each trained parameter under our name. Of an inference, L is 1."""


def observe_model(model: DETR, forward: Any, criterion: SetCriterion, batch: Batch, runtime: Runtime) -> Observation:
    """Observe what `forward` computes from a batch on its device, without dropout: a training step's `forward`, or
    where gradients are disabled what a detector calls."""
    images, mask = Preprocessing.of(model, runtime)(batch)
    with evaluation_mode(model):
        with runtime.autocast():
            outputs = forward(images, mask)
        if not torch.is_grad_enabled():
            return on_host(stacked_layers([outputs]))
        predictions: Predictions = outputs
        terms = criterion(predictions, batch.targets)
        found = {"logits": predictions.logits, "boxes": predictions.boxes_cxcywh}
        matches, _ = match(predictions, batch.targets, criterion.costs, criterion.selection)
        return on_host(found | losses(terms) | {"matches": matches} | named_gradients(model, terms["loss"]))


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
    found = on_host(losses(terms) | {f"gradient {name}": each for name, each in named.items() if each is not None})
    for parameter, gradient in before.items():
        parameter.grad = gradient
    return found


def on_host(found: Observation) -> Observation:
    return {name: value.detach().cpu() for name, value in found.items()}


def stacked_layers(layers: Sequence[dict[str, Any]]) -> Observation:
    """Stack the outputs of several decoder layers, first to last."""
    names = {"logits": "pred_logits", "boxes": "pred_boxes"}
    return {name: torch.stack([layer[key] for layer in layers]) for name, key in names.items()}


def losses(terms: dict[str, Tensor]) -> Observation:
    return {name: value for name, value in terms.items() if name.startswith("loss")}


def named_gradients(model: nn.Module, loss: Tensor) -> Observation:
    """Name each trained parameter's `gradient NAME`; facebookresearch's `backbone.0.body.` becomes our `backbone.`"""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    names = (name.replace("backbone.0.body.", "backbone.") for name in trained)
    return {f"gradient {name}": value for name, value in zip(names, gradients, strict=True)}
