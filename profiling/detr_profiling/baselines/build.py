"""Baselines on the same weights and the same batch: the plain reference, and what people use."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from detr_fast.config import require, unknown_name
from detr_fast.data.batch import Batch
from detr_fast.model.detr import DETR
from detr_profiling.baselines.other_detectors import faster_rcnn_workload, hugging_face_workload
from detr_profiling.baselines.plain_loop import (
    BoxTargets,
    PlainBatch,
    autocast,
    inference,
    plain_feed,
    training_step,
)
from detr_profiling.batches import make_batches, observed_batch
from detr_profiling.observation import (
    Observation,
    in_token_order,
    losses,
    named_gradients,
    on_host,
    proposals,
    stacked_layers,
)
from detr_profiling.own_workload import initial_model
from detr_profiling.reference.criterion import Scores, match_image, reference_criterion
from detr_profiling.reference.detr import ReferenceDETR
from detr_profiling.reference.weights import reference_of
from detr_profiling.workload import Workload, WorkloadOptions, stepping

REFERENCE = "reference"
BASELINES = (REFERENCE, "hf-eager", "hf-sdpa", "hf-compiled", "fasterrcnn")


def build_baseline(name: str, options: WorkloadOptions, dtype: torch.dtype = torch.float32) -> Workload:
    """Build the baseline `name` as it comes, whatever backends `options` ask of ours: eager, NCHW, float32, or under
    autocast where they say --precision bf16. `dtype`: of weights and pixels; float64 gives the exact reference.

    Raises UserError for an unknown name, a model that the baseline does not have, or a package that is not there.
    """
    if name not in BASELINES:
        raise unknown_name("baseline", name, BASELINES)
    options = options.resolved().but(compile=name == "hf-compiled", channels_last=False)
    torch.set_num_threads(options.runtime.threads or torch.get_num_threads())
    ours = initial_model(options)
    if name == REFERENCE:
        return reference_workload(ours, options, dtype)
    require(
        ours.config.backbone in ("resnet50", "resnet101") and not ours.config.beyond_detr,
        f"--model {options.network.model} has no counterpart in {name}: use detr_r50, detr_r101 or their DC5 variants.",
    )
    if name == "fasterrcnn":
        return faster_rcnn_workload(ours.config, options)
    return hugging_face_workload(name, ours, options)


def reference_workload(ours: DETR, options: WorkloadOptions, dtype: torch.dtype) -> Workload:
    device, config = torch.device(options.runtime.device), ours.config
    reference = reference_of(ours).to(device, dtype)
    batches = make_batches(options, config.num_classes)

    def forward(placed: PlainBatch) -> dict[str, Any]:
        with autocast(options):
            outputs = reference(placed.images, placed.mask)
        return outputs if dtype == torch.float64 else in_float32(outputs)

    def loss(placed: PlainBatch) -> Tensor:
        return reference_criterion(forward(placed), placed.targets, config.scores)["loss"]

    def place(batch: Batch) -> PlainBatch:
        return PlainBatch.of(batch, config, dtype).to(device)

    def observe() -> Observation:
        observed = place(observed_batch(options, config.num_classes))
        training = reference.training
        reference.eval()
        with torch.set_grad_enabled(options.mode == "training"):
            found = observe_reference(reference, forward, observed, options.objects)
        reference.train(training)
        return found

    step = (
        training_step(reference, loss) if options.mode == "training" else inference(reference, forward, config.scores)
    )
    run = stepping(step, plain_feed(batches, config, device, dtype), len(batches))
    return Workload(REFERENCE, options, reference, run, observe, step=lambda batch: step(place(batch)))


def observe_reference(reference: ReferenceDETR, forward: Any, placed: PlainBatch, most: int) -> Observation:
    """Observe `forward`, which is the reference on a PlainBatch; `most`: objects on an image."""
    outputs = forward(placed)
    if not torch.is_grad_enabled():
        return in_token_order(on_host(stacked_layers([outputs]) | proposals(outputs)))
    layers = [*outputs["aux_outputs"], outputs]
    scores = reference.choices.scores
    terms = reference_criterion(outputs, placed.targets, scores)
    found = stacked_layers(layers) | {"matches": match_layers(layers, placed.targets, most, scores)}
    if "enc_outputs" in outputs:
        matches = match_layers([outputs["enc_outputs"]], placed.targets, most, scores)
        found |= proposals(outputs) | {"matches of proposals": matches}
    return in_token_order(on_host(found | losses(terms) | named_gradients(reference, terms["loss"])))


def match_layers(layers: list[dict[str, Any]], targets: BoxTargets, most: int, scores: Scores) -> Tensor:
    """Match each layer: the query of each target, -1 for none, (L, B, most) int64."""
    found = torch.full((len(layers), len(targets), most), -1)
    for layer, outputs in enumerate(layers):
        for image, target in enumerate(targets):
            queries, chosen = match_image(outputs["pred_logits"][image], outputs["pred_boxes"][image], target, scores)
            found[layer, image, chosen] = queries
    return found


def in_float32(outputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, Tensor.float, outputs)
