"""Builds data, model, step and schedule from a run's options, and from a checkpoint where it continues one."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from detr_fast.config import ModelConfig
from detr_fast.console import Console
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.data.buckets import Buckets
from detr_fast.data.checks import warn_before_training
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.drawn_objects import drawn_objects
from detr_fast.data.loader import on_device, train_loader
from detr_fast.data.sampler import BATCHES_A_GROUP
from detr_fast.model.backbone import token_stride
from detr_fast.model.detr import DETR
from detr_fast.model.queries import ANCHOR_CELLS
from detr_fast.model.query_sets import QuerySets
from detr_fast.options import OptimizerOptions, TrainOptions
from detr_fast.runtime import Runtime
from detr_fast.training.batch_size import lr_factor
from detr_fast.training.checkpoint import TrainingState
from detr_fast.training.criterion import LossWeights, build_criterion
from detr_fast.training.distributed import World
from detr_fast.training.optimizer import UNPLANNED_STEPS, Schedule, build_optimizer
from detr_fast.training.step import LayerwiseNetwork, TrainStep
from detr_fast.weights import load_backbone_weights, load_for_fine_tuning, load_state_dict


def make_data(options: TrainOptions) -> tuple[CocoDataset, CocoDataset, ModelConfig]:
    """Build training and validation sets with one map of classes, and the model's configuration that fits them."""
    train_set = build_dataset(options, "train")
    config = options.network.config(num_classes=train_set.num_classes, **options.dataset.sizes_given())
    val_set = build_dataset(options, "val", config, categories=train_set.categories)
    warn_before_training(train_set, val_set)
    return train_set, val_set, config


def make_model(
    config: ModelConfig, options: TrainOptions, train_set: CocoDataset, state: TrainingState | None, out: Console
) -> DETR:
    """Make the checkpoint's model, or a new one from --weights or --backbone-weights; the same for the same seed."""
    torch.manual_seed(options.seed)
    model = DETR(config)
    expect_objects(model, train_set)
    if state:
        load_state_dict(model, state.model)
    elif weights := options.network.weights:
        kept = load_for_fine_tuning(model, weights, train_set.categories)
        for line in kept.lines(weights, config.num_classes):
            out.print(line)
    else:
        load_backbone_weights(model.backbone, config.backbone, options.network.backbone_weights)
    if options.optimizer.lr_backbone == 0:
        model.backbone.requires_grad_(False)
    model.transformer.checkpoint_activations = options.runtime.checkpoint_activations
    return model


def expect_objects(model: DETR, train_set: CocoDataset) -> None:
    """Let the proposals of encoder tokens begin with the size of the objects that training draws.

    Some hundred updates move a box little from its anchor, and an object may be several times as large.
    """
    if model.config.queries == "learned":
        return
    drawn = drawn_objects(train_set)
    if len(drawn.sizes_px):
        anchors_px = np.minimum(ANCHOR_CELLS * token_stride(model.config), drawn.images_px)
        model.query_selection.begin_at(
            *(torch.from_numpy(each / drawn.images_px) for each in (drawn.sizes_px, anchors_px))
        )


def make_step(
    model: DETR, options: TrainOptions, runtime: Runtime, world: World, state: TrainingState | None
) -> TrainStep:
    """Make the step of a model that is on its device already."""
    asked, factor = options.optimizer, lr_factor(options.optimizer, world.size)
    criterion = build_criterion(
        model.config.num_classes,
        LossWeights(no_object=asked.no_object_weight),
        scores=model.config.scores,
        class_loss=asked.class_loss,
    )
    sets = make_sets(model, options, runtime)
    step = TrainStep(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(
            LayerwiseNetwork(model, sets),
            asked.lr * factor,
            asked.lr_backbone * factor,
            asked.weight_decay,
            asked.muon,
        ),
        runtime=runtime,
        world=world,
        clip=asked.clip,
        ema=copy.deepcopy(model).eval().requires_grad_(False) if asked.ema else None,
        ema_decay=asked.ema,
        sets=sets,
    )
    if state:
        if sets:
            sets.load_state_dict(state.query_sets or {})
        restore_moments(step.optimizer, state.optimizer)
        keep_layouts(step.optimizer)
        if state.scaler:
            step.scaler.load_state_dict(state.scaler)
        if step.ema and state.ema:
            load_state_dict(step.ema, state.ema)
    return step


def make_sets(model: DETR, options: TrainOptions, runtime: Runtime) -> QuerySets | None:
    """Make the further sets of queries, the same for the same seed; None where the network's own is all."""
    groups, denoise = options.optimizer.groups, options.optimizer.denoise
    if (groups, denoise) == (1, 0):
        return None
    torch.manual_seed(options.seed)
    sets = QuerySets(model.config, groups, denoise).to(runtime.device)
    if model.config.queries == "encoder":
        for group in sets.groups:
            group.query_selection.begin_like(model.query_selection)
    return sets


def restore_moments(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load the moments of a stored optimizer; learning rates and decay stay as they are asked for now.

    The backbone's group is the last, and absent where it is not trained. Moments that are not stored start anew.
    """
    own = optimizer.state_dict()
    state: dict[int, Any] = {}
    for group, before in zip(own["param_groups"], stored["param_groups"], strict=False):
        pairs = zip(group["params"], before["params"], strict=True)
        state |= {own_index: stored["state"][theirs] for own_index, theirs in pairs if theirs in stored["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def keep_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Store each moment in its parameter's memory order, as fused AdamW requires; a checkpoint may have another."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)


def make_schedule(options: OptimizerOptions, batches_per_epoch: int, state: TrainingState | None = None) -> Schedule:
    """Make the schedule of --epochs; with --minutes one without an end, or with that which `state` planned for them."""

    def steps(epochs: int) -> int:
        return epochs * batches_per_epoch // options.accumulate

    schedule = Schedule(options.schedule, steps(options.epochs), steps(options.lr_drop), options.warmup_steps)
    if not options.minutes:
        return schedule
    planned = state is not None and state.options.optimizer.minutes == options.minutes
    return schedule.of((planned and state and state.progress.planned_steps) or UNPLANNED_STEPS)


class Extremes(NamedTuple):
    """Bounds on a run's batches."""

    objects: int
    """Most objects of one image."""
    mixed: bool
    """A batch may hold wide and high images."""
    padded: bool
    """Images may be smaller than their batch."""


def extremes_of(options: TrainOptions, train_set: CocoDataset, batches_per_epoch: int) -> Extremes:
    """Bound a run's batches by its annotations alone.

    A group of few batches, as the rest of an epoch may be, mixes shapes even where batches are arranged by shape.
    """
    records, asked = train_set.records, options.augmentation
    sizes = {(record.height, record.width) for record in records}
    parts = train_set.composition.most_parts if train_set.composition else 1
    drawn = len(asked.train_sizes) > 1 or bool(asked.crop_sizes)
    return Extremes(
        objects=parts * max(len(record.labels) for record in records),
        mixed=not asked.buckets or 0 < batches_per_epoch % BATCHES_A_GROUP < LEAST_ARRANGED,
        padded=drawn or len(sizes) > 1 or any(side % SHAPE_STEP_PX for side in train_set.augmentation(0, 0).size),
    )


LEAST_ARRANGED = 16
"""Arranged groups of at least this many batches have none larger than the largest image, in steps of 64 pixels."""


def largest_batch(options: TrainOptions, config: ModelConfig, extremes: Extremes) -> Batch:
    """Make the largest batch that training can meet: gray images, with as many rows of targets as any needs."""
    sides = max(options.augmentation.train_sizes), options.dataset.max_size or config.max_size
    height, width = (-(-side // SHAPE_STEP_PX) * SHAPE_STEP_PX for side in sides)
    if extremes.mixed:
        height = width
    size = height - extremes.padded, width - extremes.padded
    sample = Sample(
        image=torch.full((3, 1, 1), 128, dtype=torch.uint8),
        labels=torch.zeros(extremes.objects, dtype=torch.int64),
        boxes_cxcywh=torch.full((extremes.objects, 4), 0.5),
        image_id=0,
        original_size=size,
        size=size,
    )
    return collate([sample] * options.optimizer.batch_size, padded_size=(height, width))


SHAPE_STEP_PX = 64
"""Sides of batches are multiples of it where each new shape costs a compilation or a capture: DETR's augmentation of
COCO then has about 80 shapes, for 6 % more pixels."""
EAGER_CPU_STEP_PX = 32
"""Elsewhere a new shape costs oneDNN's code for its convolutions, and memory that is kept for it."""


def shape_step_px(device: str, compiled: bool) -> int:
    return SHAPE_STEP_PX if compiled or device == "cuda" else EAGER_CPU_STEP_PX


def make_batches(
    options: TrainOptions, train_set: CocoDataset, runtime: Runtime, world: World, first: tuple[int, int]
) -> Iterator[Batch]:
    """Yield this rank's batches without end, on its device, from (epoch, batch) `first` on."""
    epoch, batch = first
    step = shape_step_px(runtime.device.type, runtime.compile)
    buckets = Buckets(lambda epoch, images: train_set.augmentations(epoch, images).sizes, step)
    batches = train_loader(
        train_set,
        options.optimizer.batch_size,
        runtime.workers(options.dataset.workers),
        options.seed,
        rank=world.rank,
        world=world.size,
        start_epoch=epoch,
        start_batch=batch,
        pin_memory=runtime.device.type == "cuda",
        buckets=buckets if options.augmentation.buckets else None,
    )
    return on_device(batches, runtime.device)
