"""Builds data, model, step and schedule from a run's options, and from a checkpoint where it continues one."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from detr_fast.config import ModelConfig, TrainConfig, model_config
from detr_fast.console import Console
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.data.buckets import Buckets
from detr_fast.data.checks import warn_before_training
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.loader import on_device, train_loader
from detr_fast.data.sampler import BATCHES_A_GROUP
from detr_fast.model.detr import DETR
from detr_fast.runtime import Runtime
from detr_fast.training.batch_size import lr_factor
from detr_fast.training.checkpoint import TrainingState
from detr_fast.training.criterion import LossWeights, build_criterion
from detr_fast.training.distributed import World
from detr_fast.training.optimizer import Schedule, build_optimizer
from detr_fast.training.step import TrainStep
from detr_fast.weights import load_backbone_weights, load_for_fine_tuning, load_state_dict


def make_data(options: TrainConfig) -> tuple[CocoDataset, CocoDataset, ModelConfig]:
    """Build training and validation sets with one map of classes, and the model's configuration that fits them."""
    train_set = build_dataset(options, "train")
    shared = ModelConfig.__dataclass_fields__.keys() & TrainConfig.__dataclass_fields__.keys() - {"num_classes"}
    changes = {name: value for name in shared if (value := getattr(options, name)) is not None}
    config = model_config(options.model, num_classes=train_set.num_classes, **changes)
    train_set.warn_if_queries_are_few(config.num_queries)
    val_set = build_dataset(options, "val", config, categories=train_set.categories)
    warn_before_training(train_set, val_set)
    return train_set, val_set, config


def make_model(
    config: ModelConfig, options: TrainConfig, train_set: CocoDataset, state: TrainingState | None, out: Console
) -> DETR:
    """Make the checkpoint's model, or a new one from --weights or --backbone-weights; the same for the same seed."""
    torch.manual_seed(options.seed)
    model = DETR(config)
    if state:
        load_state_dict(model, state.model)
    elif options.weights:
        kept = load_for_fine_tuning(model, options.weights, train_set.categories)
        for line in kept.lines(options.weights, config.num_classes):
            out.print(line)
    else:
        load_backbone_weights(model.backbone, config.backbone, options.backbone_weights)
    if options.lr_backbone == 0:
        model.backbone.requires_grad_(False)
    model.transformer.checkpoint_activations = options.checkpoint_activations
    return model


def make_step(
    model: DETR, options: TrainConfig, runtime: Runtime, world: World, state: TrainingState | None
) -> TrainStep:
    """Make the step of a model that is on its device already."""
    criterion = build_criterion(model.config.num_classes, LossWeights(no_object=options.no_object_weight))
    factor = lr_factor(options, world.size)
    step = TrainStep(
        model=model,
        criterion=criterion,
        optimizer=build_optimizer(model, options.lr * factor, options.lr_backbone * factor, options.weight_decay),
        runtime=runtime,
        world=world,
        clip=options.clip,
        ema=copy.deepcopy(model).eval().requires_grad_(False) if options.ema else None,
        ema_decay=options.ema,
    )
    if state:
        restore_moments(step.optimizer, state.optimizer)
        keep_layouts(step.optimizer)
        if state.scaler:
            step.scaler.load_state_dict(state.scaler)
        if step.ema and state.ema:
            load_state_dict(step.ema, state.ema)
    return step


def restore_moments(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load the moments of a stored optimizer; learning rates and decay stay as they are asked for now.

    The backbone's group is the second, and absent where it is not trained. Moments that are not stored start anew.
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


def make_schedule(options: TrainConfig, batches_per_epoch: int) -> Schedule:
    def steps(epochs: int) -> int:
        return epochs * batches_per_epoch // options.accumulate

    return Schedule(options.schedule, steps(options.epochs), steps(options.lr_drop), options.warmup_steps)


class Extremes(NamedTuple):
    """Bounds on a run's batches."""

    objects: int
    """Most objects of one image."""
    mixed: bool
    """A batch may hold wide and high images."""
    padded: bool
    """Images may be smaller than their batch."""


def extremes_of(options: TrainConfig, train_set: CocoDataset, batches_per_epoch: int) -> Extremes:
    """Bound a run's batches by its annotations alone.

    A group of few batches, as the rest of an epoch may be, mixes shapes even where batches are arranged by shape.
    """
    records = train_set.records
    sizes = {(record.height, record.width) for record in records}
    drawn = len(options.train_sizes) > 1 or bool(options.crop_sizes)
    return Extremes(
        objects=max(len(record.labels) for record in records),
        mixed=not options.buckets or 0 < batches_per_epoch % BATCHES_A_GROUP < LEAST_ARRANGED,
        padded=drawn or len(sizes) > 1 or any(side % SHAPE_STEP_PX for side in train_set.augmentation(0, 0).size),
    )


LEAST_ARRANGED = 16
"""Arranged groups of at least this many batches have none larger than the largest image, in steps of 64 pixels."""


def largest_batch(options: TrainConfig, config: ModelConfig, extremes: Extremes) -> Batch:
    """Make the largest batch that training can meet: gray images, with as many rows of targets as any needs."""
    sides = max(options.train_sizes), options.max_size or config.max_size
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
    return collate([sample] * options.batch_size, padded_size=(height, width))


SHAPE_STEP_PX = 64
"""Sides of batches are multiples of it where each new shape costs a compilation or a capture: DETR's augmentation of
COCO then has about 80 shapes, for 6 % more pixels."""


def shape_step_px(device: str, compiled: bool) -> int:
    return SHAPE_STEP_PX if compiled or device == "cuda" else 1


def make_batches(
    options: TrainConfig, train_set: CocoDataset, runtime: Runtime, world: World, first: tuple[int, int]
) -> Iterator[Batch]:
    """Yield this rank's batches without end, on its device, from (epoch, batch) `first` on."""
    epoch, batch = first
    step = shape_step_px(runtime.device.type, runtime.compile)
    buckets = Buckets(lambda epoch, images: train_set.augmentations(epoch, images).sizes, step)
    batches = train_loader(
        train_set,
        options.batch_size,
        runtime.workers(options.workers),
        options.seed,
        rank=world.rank,
        world=world.size,
        start_epoch=epoch,
        start_batch=batch,
        pin_memory=runtime.device.type == "cuda",
        buckets=buckets if options.buckets else None,
    )
    return on_device(batches, runtime.device)
