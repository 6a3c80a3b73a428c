"""detr_fast as a workload: its training step or its inference, with any backend, eager, compiled or as CUDA graphs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from detr_fast.config import require
from detr_fast.data.batch import Batch
from detr_fast.detector import Detector, place
from detr_fast.model.backbone import DEPTHS
from detr_fast.model.backends import hand_out
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.runtime import Runtime, choose_runtime
from detr_fast.training.criterion import SetCriterion, build_criterion
from detr_fast.training.graphed_step import GraphedStep, why_not_graphed
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep
from detr_fast.weights import export_state_dict, load_state_dict
from detr_profiling.batches import copied_ahead, make_batches, observed_batch
from detr_profiling.measuring.timing import STEADY_AFTER
from detr_profiling.observation import Observation, observe_captured_step, observe_model
from detr_profiling.reference.name_seeded_weights import perturbed_state_dict
from detr_profiling.workload import Workload, WorkloadOptions, stepping


def initial_model(options: WorkloadOptions) -> DETR:
    """Make the model on the CPU, its weights from the seed alone.

    Norms and biases of DETR around a ResNet, and of other decoders, are not 1 and 0, so that every term shows.
    """
    torch.manual_seed(options.seed)
    model = DETR(options.network.config())
    if model.config.backbone in DEPTHS and not model.config.beyond_detr:
        load_state_dict(model, perturbed_state_dict(export_state_dict(model, "facebook"), options.seed))
    elif model.config.beyond_detr.keys() - {"source_position"}:
        load_state_dict(model, perturbed_state_dict(model.state_dict(), options.seed))
    return model


def build_workload(options: WorkloadOptions, backends: Mapping[str, str] | None = None) -> Workload:
    """Build ours; `backends`: of single operations, where they are to differ from what the options ask for.

    Raises UserError where something asked for by name is not there.
    """
    options = options.resolved()
    torch.set_num_threads(options.runtime.threads or torch.get_num_threads())
    runtime = choose_runtime(options.runtime)
    model = place(initial_model(options).train(options.mode == "training"), runtime, backends)
    if options.mode == "inference" and runtime.optimizes:
        model = optimized(model, runtime.dtype)
    criterion = build_criterion(model.config.num_classes, scores=model.config.scores)
    hand_out(model.selection, criterion)
    if options.mode == "training":
        step, forward = training_step(model, criterion, options, runtime)
    else:
        step, forward = inference_step(model, options, runtime)
    batches = make_batches(options, model.config.num_classes)
    run = stepping(step, copied_ahead(batches, runtime.device), len(batches))

    def observe() -> Observation:
        observed = observed_batch(options, model.config.num_classes).to(runtime.device)
        with torch.set_grad_enabled(options.mode == "training"):
            for _ in range(STEADY_AFTER["cuda"] if options.runtime.capture and options.mode == "inference" else 1):
                found = observe_model(model, forward, criterion, observed, runtime)
            if options.runtime.capture and options.mode == "training":
                found |= observe_captured_step(model, criterion, observed, runtime)
        return found

    return Workload("detr_fast", options, model, run, observe, runtime.reasons, step)


def training_step(
    model: DETR, criterion: SetCriterion, options: WorkloadOptions, runtime: Runtime
) -> tuple[Callable[[Batch], Any], Any]:
    """Make a step with one batch; return it and what it calls in the model's place.

    Raises UserError where it cannot be captured.
    """
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    step = TrainStep(model, criterion, optimizer, runtime)
    if not options.runtime.capture:
        return lambda batch: step([batch]), step.forward
    problem = why_not_graphed(step)
    require(problem is None, f"--capture cannot be done: {problem}.")
    graphed = GraphedStep(MicroBatches(step))
    return lambda batch: graphed([batch]), step.forward


def inference_step(model: DETR, options: WorkloadOptions, runtime: Runtime) -> tuple[Callable[[Batch], Any], Any]:
    """Make an inference of one batch; return it and what it calls in the model's place.

    Raises UserError where it cannot be captured.
    """
    # without --capture no replay, which evaluation on a GPU is by default: hooks and profiler ranges stay
    detector = Detector(model, runtime=replace(runtime, capture=options.runtime.capture))
    replays = detector.replays or not options.runtime.capture
    require(replays, "--capture takes an optimised model on a GPU, without --compile.")
    return detector.detect, detector.forward
