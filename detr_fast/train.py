"""`python -m detr_fast.train`: trains a detector, evaluates it, and leaves everything in one folder."""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from detr_fast.command import run
from detr_fast.config import RECIPES, ModelConfig, TrainConfig, model_config, require
from detr_fast.data.batching import evaluation_loader, train_loader
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.sampler import EpochSampler
from detr_fast.data.shapes import parse_shapes
from detr_fast.evaluation.coco_metrics import METRICS, Evaluation, evaluate_model
from detr_fast.evaluation.plots import draw_ap_curves, draw_loss_curves
from detr_fast.evaluation.report import write_evaluation
from detr_fast.model.backbone import load_backbone_weights
from detr_fast.model.detr import DETR
from detr_fast.runtime import Runtime, choose_runtime
from detr_fast.training.checkpoint import load_checkpoint
from detr_fast.training.criterion import LossWeights, build_criterion
from detr_fast.training.distributed import World, joined_world
from detr_fast.training.interruption import deferred_interruption
from detr_fast.training.loop import Progress, TrainingLoop
from detr_fast.training.metrics_log import MetricsLog
from detr_fast.training.optimizer import Schedule, build_optimizer
from detr_fast.training.progress import TrainingDisplay
from detr_fast.training.run_folder import RunFolder, held_run_folder
from detr_fast.training.step import TrainStep
from detr_fast.weights import load_for_fine_tuning, load_state_dict


def default_options(argv: Sequence[str]) -> TrainConfig:
    """What holds where an option is not given: a resumed run's own options, else the recipe of the model to be
    trained."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--model", "--output", "--resume"):
        parser.add_argument(name)
    asked, _ = parser.parse_known_args(argv)
    resumed = resume_path(asked.resume, asked.output or TrainConfig.output)
    if resumed:
        return TrainConfig.from_dict(load_checkpoint(resumed)["options"])
    data = asked.data or TrainConfig.data
    if not data.startswith("shapes"):
        return RECIPES.get(asked.model, TrainConfig(model=asked.model or TrainConfig.model))
    model, side = asked.model or "detr_tiny", parse_shapes(data)
    recipe = RECIPES.get(model, TrainConfig(model=model))
    return replace(recipe, train_sizes=(side,), crop_sizes=(), image_size=side, max_size=side)


def resume_path(resume: str | None, output: str) -> Path | None:
    """The checkpoint to continue; None where none is asked for, or `auto` finds none."""
    if resume is None:
        return None
    path = Path(output) / "checkpoints" / "last.pt" if resume == "auto" else Path(resume)
    return path if path.exists() or resume != "auto" else None


def resolve_model_config(options: TrainConfig, train_set: CocoDataset) -> ModelConfig:
    """The preset with what the data and the options say of it."""
    asked = {name: getattr(options, name) for name in ("num_queries", "dropout", "image_size", "max_size")}
    changes = {name: value for name, value in asked.items() if value is not None}
    return model_config(options.model, num_classes=train_set.num_classes, **changes)


def make_model(
    config: ModelConfig, options: TrainConfig, train_set: CocoDataset, state: dict[str, Any] | None, console: Console
) -> DETR:
    """The checkpoint's model, or a new one from --weights or --backbone-weights; the same for the same seed."""
    torch.manual_seed(options.seed)
    model = DETR(config)
    model.categories = train_set.categories
    if state:
        load_state_dict(model, state["model"])
    elif options.weights:
        kept = load_for_fine_tuning(model, options.weights)
        console.print(f"{options.weights}: the class head is kept for {len(kept)} of {config.num_classes} classes")
    else:
        load_backbone_weights(model.backbone, config.backbone, options.backbone_weights)
    model.transformer.checkpoint_activations = options.checkpoint_activations
    return model


def make_step(model: DETR, options: TrainConfig, runtime: Runtime, world: World) -> TrainStep:
    criterion = build_criterion(model.config.num_classes, LossWeights(no_object=options.no_object_weight))
    return TrainStep(
        model=model,
        criterion=criterion.to(runtime.device),
        optimizer=build_optimizer(model, options.lr, options.lr_backbone, options.weight_decay),
        runtime=runtime,
        world=world,
        clip=options.clip,
        averaged=copy.deepcopy(model).eval().requires_grad_(False) if options.ema else None,
        ema_decay=options.ema,
    )


def make_schedule(options: TrainConfig, batches_per_epoch: int) -> Schedule:
    def steps(epochs: int) -> int:
        return epochs * batches_per_epoch // options.accumulate

    return Schedule(options.schedule, steps(options.epochs), steps(options.lr_drop), options.warmup_steps)


def check_resumed(state: dict[str, Any], options: TrainConfig, config: ModelConfig) -> None:
    """Raises UserError where the options would not continue the checkpoint's run but start another one."""
    require(
        "progress" in state and "options" in state,
        "--resume takes a last.pt, which holds the optimizer too. Use --weights to start from a best.pt.",
    )
    stored = {**state["options"], **state["model_config"]}
    asked = {**options.to_dict(), **config.to_dict()}
    fixed = (*ModelConfig.__dataclass_fields__, "data", "seed", "batch_size", "accumulate", "ema")
    for name in fixed:
        before, now = (tuple(v) if isinstance(v, list) else v for v in (stored.get(name), asked[name]))
        option = f"--{name.replace('_', '-')}"
        require(
            before == now,
            f"--resume: the checkpoint was trained with {option} {before}, asked for is {now}. "
            f"Give {option} {before}, or start a new run with --weights.",
        )


def stored_metadata(model: DETR) -> dict[str, Any]:
    """What every checkpoint says of its model besides the weights."""
    categories = model.categories
    return {
        "model_config": model.config.to_dict(),
        "categories": None if categories is None else [vars(category) for category in categories],
    }


def train(options: TrainConfig, runtime: Runtime, world: World) -> int:
    """One process of a training run; returns the exit code."""
    console = Console(quiet=not world.is_main)
    resumed = resume_path(options.resume, options.output)
    state = load_checkpoint(resumed) if resumed else None
    train_set = build_dataset(options, "train")
    config = resolve_model_config(options, train_set)
    if state:
        check_resumed(state, options, config)
    val_set = build_dataset(options, "val", config, categories=train_set.categories, raw_ids=not train_set.categories)
    train_set.warn_if_queries_are_few(config.num_queries)
    model = runtime.place(make_model(config, options, train_set, state, console))
    step = make_step(model, options, runtime, world)
    if state and step.averaged:
        load_state_dict(step.averaged, state["ema"])

    workers = runtime.workers(options.workers)
    loader_options = (options.batch_size, workers, options.seed, world.rank, world.size)
    sampler = EpochSampler(len(train_set), *loader_options[:1], *loader_options[2:])
    schedule = make_schedule(options, sampler.batches_per_epoch)
    progress = Progress(**state["progress"]) if state else Progress()
    if progress.step >= schedule.total_steps:
        console.print(f"{resumed} has finished its {options.epochs} epochs: nothing to do.")
        return 0
    start = divmod(progress.step * options.accumulate, sampler.batches_per_epoch)
    batches = train_loader(train_set, *loader_options, *start, pin_memory=runtime.device.type == "cuda")

    def evaluate() -> Evaluation:
        kept = step.averaged or model
        loader = evaluation_loader(val_set, options.batch_size, workers, rank=world.rank, world=world.size)
        return evaluate_model(kept, val_set, loader, replace(runtime, compile=False))

    with held_output(options, world, resuming=state is not None, model=model) as folder:
        describe(console, options, runtime, world, model, (train_set, val_set), schedule)
        log = MetricsLog(folder.metrics, folder.tensorboard, METRICS, progress.step) if world.is_main else None
        display = TrainingDisplay(console, schedule.total_steps, progress.step, options.epochs)
        loop = TrainingLoop(
            options=options,
            step=step,
            schedule=schedule,
            batches=batches,
            batches_per_epoch=sampler.batches_per_epoch,
            evaluate=evaluate,
            folder=folder if world.is_main else None,
            log=log,
            display=display,
            progress=progress,
            metadata=stored_metadata(model),
        )
        if state:
            loop.restore(state)
        with deferred_interruption() as interruption, display:
            code = loop.run(interruption)
        if log:
            log.close()
        if loop.evaluation and world.is_main:
            write_results(folder, loop.evaluation, val_set)
            console.print(f"Everything is in {folder.root}: see plots/, evaluation.json and checkpoints/best.pt")
        return code


@contextmanager
def held_output(options: TrainConfig, world: World, resuming: bool, model: DETR) -> Iterator[RunFolder]:
    """The output folder, held by the main process; the others only know where it is."""
    root = Path(options.output)
    if not world.is_main:
        yield RunFolder(root)
        return
    copies = 4 if options.ema else 3  # weights, the optimizer's two moments, the average
    checkpoint_bytes = copies * sum(parameter.numel() * 4 for parameter in model.parameters())
    with held_run_folder(root, resuming, checkpoint_bytes) as folder:
        folder.config.write_text(json.dumps({"options": options.to_dict(), **stored_metadata(model)}, indent=2))
        yield folder


def describe(
    console: Console,
    options: TrainConfig,
    runtime: Runtime,
    world: World,
    model: DETR,
    data: tuple[CocoDataset, CocoDataset],
    schedule: Schedule,
) -> None:
    """What is about to happen, before it does."""
    train_set, val_set = data
    effective = options.batch_size * options.accumulate * world.size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batch = f"{options.batch_size} x {options.accumulate} accumulated x {world.size} processes"
    lines = {
        "model": f"{options.model}, {parameters:,} parameters, {model.config.num_classes} classes",
        "data": f"{options.data}: {len(train_set)} training and {len(val_set)} validation images",
        "batch": f"{batch} = {effective} images a step",
        "length": f"{options.epochs} epochs, {schedule.total_steps} steps",
        **runtime.reasons,
        "compile": "torch.compile: the first step takes a minute" if runtime.compile else "no",
        "output": options.output,
    }
    for name, value in lines.items():
        console.print(f"{name:>18}  {value}", highlight=False, markup=False, soft_wrap=True)
    for dataset in data:
        for line in dataset.annotations.corrections.lines():
            console.print(f"{dataset.annotation_file}: {line}", markup=False, soft_wrap=True)


def write_results(folder: RunFolder, evaluation: Evaluation, val_set: CocoDataset) -> None:
    """evaluation.json and the pictures."""
    write_evaluation(evaluation, val_set, folder.root)
    draw_loss_curves(folder.metrics, folder.plots / "loss.png")
    draw_ap_curves(folder.metrics, folder.plots / "ap.png")


def main(options: TrainConfig) -> int:
    runtime = choose_runtime(options)
    with joined_world(runtime.device) as world:
        return train(options, runtime, world)


if __name__ == "__main__":
    run(main, TrainConfig, default_options)
