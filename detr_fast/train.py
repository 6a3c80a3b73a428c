"""`python -m detr_fast.train`: training of a detector, with its evaluation, in one output folder."""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from detr_fast.command import run
from detr_fast.config import ModelConfig, require
from detr_fast.console import Console
from detr_fast.data.batch import Batch
from detr_fast.data.coco import CocoDataset
from detr_fast.data.loader import evaluation_loader, on_device
from detr_fast.data.sampler import batches_per_epoch
from detr_fast.detector import Detector, configure_process, place
from detr_fast.evaluation.coco_metrics import METRICS, UNLIMITED, Evaluation, evaluate_detector
from detr_fast.evaluation.plots import draw_ap_curves, draw_loss_curves
from detr_fast.evaluation.report import write_evaluation
from detr_fast.files import write_json
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.options import OptimizerOptions, TrainOptions
from detr_fast.runtime import Runtime, choose_runtime
from detr_fast.training.advice import Length, judge, warn
from detr_fast.training.autotune import tuning_of
from detr_fast.training.batch_size import batch_line, with_batches
from detr_fast.training.build import (
    extremes_of,
    largest_batch,
    make_batches,
    make_data,
    make_model,
    make_schedule,
    make_step,
)
from detr_fast.training.checkpoint import Progress, RunFacts, TrainingState
from detr_fast.training.data_rate import measure_data, training_rate
from detr_fast.training.display import TrainingDisplay
from detr_fast.training.distributed import World, joined_world
from detr_fast.training.graphed_step import GraphedStep, why_not_graphed
from detr_fast.training.interruption import deferred_interruption
from detr_fast.training.loop import TrainingLoop
from detr_fast.training.metrics_log import MetricsLog
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.optimizer import Schedule
from detr_fast.training.profiled_step import ProfiledStep
from detr_fast.training.recipes import recipe_asked
from detr_fast.training.resuming import (
    changes,
    check_resumed,
    continued,
    digests,
    evaluates_otherwise,
    load_resumed,
    located,
    resumed_options,
    resumed_path,
)
from detr_fast.training.run_folder import RunFolder, held_run_folder
from detr_fast.training.step import TrainStep


def default_options(argv: Sequence[str]) -> TrainOptions:
    """Return the defaults of all options: a resumed run's own options, else the recipe of the model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--data", "--output", "--resume"):
        parser.add_argument(name)
    asked, _ = parser.parse_known_args(argv)
    path = resumed_path(asked.resume, asked.output or TrainOptions.output)
    if path:
        return resumed_options(path, data_asked=asked.data is not None)
    return recipe_asked(argv)


def train(options: TrainOptions, runtime: Runtime, world: World) -> int:
    """Run one process of a training run; returns the exit code."""
    console = Console(quiet=not world.is_main)
    options = located(options)
    resumed = resumed_path(options.resume, options.output)
    state = load_resumed(resumed)
    with warnings.catch_warnings():
        if not world.is_main:
            warnings.simplefilter("ignore")  # the main process warns of the same
        train_set, val_set, config = make_data(options)
    if state:
        check_resumed(state, options, config, train_set, val_set)
        options = continued(options, state, world.size)
    options = with_batches(options, config, runtime.device.type, world.size, len(train_set))
    per_epoch = batches_per_epoch(len(train_set), options.optimizer.batch_size, world.size)
    schedule = make_schedule(options.optimizer, per_epoch, state)
    if options.data_only:
        configure_process(runtime)
        rate = training_rate(RunFolder(Path(options.output)).metrics, world.size)
        batches = make_batches(options, train_set, runtime, world, (0, 0))
        measure_data(batches, config, runtime, options.dataset.workers, console, rate)
        return 0
    progress = progress_of(state, options, config, schedule.total_steps)
    if progress.step == schedule.total_steps and progress.evaluated_step == progress.step:
        asked = "minutes" if options.optimizer.minutes else "epochs"
        length = getattr(options.optimizer, asked)
        console.print(f"{resumed} has finished its {length:g} {asked}: nothing to do. More --{asked} go on.")
        return 0
    if state:
        console.print(changes(state, options))
    if world.is_main:
        warn(judge(options, config, train_set, Length.of(options.optimizer, len(train_set), world.size)))
    model = make_model(config, options, train_set, state, console)
    first = divmod(progress.step * options.optimizer.accumulate, per_epoch)
    with held_output(options, world, model, resuming=is_last_of(resumed, options.output)) as folder:
        tuning = tuning_of(state, options, train_set, config, runtime.device, world, console)
        runtime = choose_runtime(options.runtime, tuning)
        step = make_step(place(model, runtime), options, runtime, world, state)
        wrapped = wrapped_step(
            step, options, largest_batch(options, config, extremes_of(options, train_set, per_epoch))
        )
        length = length_line(options.optimizer, schedule)
        describe(console, options, wrapped, (train_set, val_set), length)
        facts = RunFacts(
            model_config=config,
            categories=train_set.categories,
            options=options,
            tuning=tuning.to_dict() if tuning else None,
            data=digests(train_set, val_set),
            processes=world.size,
        )
        if world.is_main:  # nothing can be refused any more: these are the options that run
            write_json(folder.config, facts.about())
        columns = (*METRICS, *UNLIMITED, "trained_seconds")  # the limit's stay empty where it is never met
        log = MetricsLog(folder.metrics, folder.tensorboard, columns, progress.step) if world.is_main else None
        loop = TrainingLoop(
            step=step,
            take_step=wrapped,
            schedule=schedule,
            batches=make_batches(options, train_set, runtime, world, first),
            batches_per_epoch=per_epoch,
            evaluate=evaluation_of(step, val_set, options),
            folder=folder if world.is_main else None,
            log=log,
            display=TrainingDisplay(console, schedule.total_steps, progress.step, options.optimizer.epochs),
            facts=facts,
            progress=progress,
        )
        with ExitStack() as stack:
            if log:
                stack.enter_context(closing(log))
            interruption = stack.enter_context(deferred_interruption())
            stack.enter_context(loop.display)
            if options.profile and world.is_main:
                profiled = ProfiledStep(wrapped, options.profile, folder, runtime.device, loop.display.print)
                loop.take_step = stack.enter_context(profiled)
            code = loop.run(interruption)
        if loop.evaluation and world.is_main:
            write_results(folder, loop.evaluation, val_set)
            if options.optimizer.minutes:
                epochs = loop.epochs_of(loop.total_steps)
                console.print(f"{loop.total_steps} steps, {epochs:.1f} epochs: --epochs {epochs:.0f} repeats it.")
            console.print(last_line(folder, loop.progress))
    return code


def progress_of(state: TrainingState | None, options: TrainOptions, config: ModelConfig, total_steps: int) -> Progress:
    """Return the progress to go on from. Raises UserError where the run has no step to make, or made too many."""
    progress = replace(state.progress) if state else Progress()
    require(
        total_steps > 0, "One update takes more batches than all epochs have: lower --accumulate or --effective-batch."
    )
    require(
        progress.step <= total_steps,
        f"--epochs {options.optimizer.epochs}: the run to resume has done {progress.step} steps, and that many epochs "
        f"have {total_steps}. Give more --epochs.",
    )
    otherwise = state is not None and evaluates_otherwise(state, config)
    if otherwise:
        progress.best_ap = -math.inf
    if progress.step == total_steps and (otherwise or not RunFolder(Path(options.output)).evaluation.exists()):
        progress.evaluated_step = -1  # once more: the first was killed before it was written, or of another size
    return progress


def last_line(folder: RunFolder, progress: Progress) -> str:
    """Say where everything is, and which weights to take."""
    if progress.best_ap >= 0:
        return f"Everything is in {folder.root}: see plots/, evaluation.json and checkpoints/best.pt"
    return f"Everything is in {folder.root}. No AP was measured: checkpoints/best.pt has the latest weights."


def wrapped_step(step: TrainStep, options: TrainOptions, largest: Batch) -> MicroBatches | GraphedStep:
    """Wrap `step` in micro-batches and, where asked for or measured to be faster, in CUDA graphs.

    On a GPU the micro-batches are as small as it takes for `largest` to fit into memory.
    """
    runtime, micro_batches = step.runtime, MicroBatches(step)
    problem = why_not_graphed(step) if runtime.capture else None
    require(
        problem is None or not options.runtime.capture, f"--capture cannot be done: {problem}. Or leave --capture out."
    )
    wrapped = GraphedStep(micro_batches) if runtime.capture and problem is None else micro_batches
    if runtime.device.type == "cuda":
        wrapped.find_micro_batch_size(next(on_device([largest], runtime.device)))
        torch.cuda.reset_peak_memory_stats(runtime.device)  # what is logged is to be the run's
    return wrapped


def is_last_of(path: Path | None, output: str) -> bool:
    """Tell whether `path` is the output folder's own checkpoint: another run's may not take its place."""
    return path is not None and path.resolve() == RunFolder(Path(output)).last.resolve()


def evaluation_of(step: TrainStep, val_set: CocoDataset, options: TrainOptions) -> Callable[[], Evaluation]:
    """Return a function that evaluates the weights to keep, uncompiled: compiling would take longer than it saves."""
    runtime, world = replace(step.runtime, compile=False), step.world
    workers = runtime.workers(options.dataset.workers)

    def evaluate() -> Evaluation:
        pin_memory = runtime.device.type == "cuda"
        loader = evaluation_loader(val_set, options.optimizer.batch_size, workers, pin_memory, world.rank, world.size)
        network = step.ema or step.model
        if runtime.optimizes:
            network = optimized(network, runtime.dtype)
        return evaluate_detector(Detector(network, runtime=runtime), val_set, loader)

    return evaluate


@contextmanager
def held_output(options: TrainOptions, world: World, model: DETR, resuming: bool) -> Iterator[RunFolder]:
    """Lock the output folder in the main process, and yield it in all."""
    root = Path(options.output)
    if not world.is_main:
        yield RunFolder(root)
        return
    copies = 4 if options.optimizer.ema else 3  # weights, the optimizer's two moments, the average
    checkpoint_bytes = copies * sum(parameter.numel() * 4 for parameter in model.parameters())
    with held_run_folder(root, resuming, checkpoint_bytes) as folder:
        yield folder


def describe(
    console: Console,
    options: TrainOptions,
    wrapped: MicroBatches | GraphedStep,
    data: tuple[CocoDataset, CocoDataset],
    length: str,
) -> None:
    """Print what is about to happen, before it does."""
    step, graphed = wrapped.step, isinstance(wrapped, GraphedStep) and not wrapped.gave_up
    model, runtime, processes = step.model, step.runtime, step.world.size
    train_set, val_set = data
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matched, denoising = options.optimizer.groups, options.optimizer.denoise
    sets = {"query sets": f"{matched} matched, {denoising} denoising"} if step.sets else {}
    lines = {
        "model": f"{options.network.model}, {parameters:,} parameters, {model.config.num_classes} classes",
        "data": f"{options.dataset.data}: {len(train_set)} training and {len(val_set)} validation images",
        **sets,
        "batch": batch_line(options.optimizer, processes, wrapped.count),
        "length": length,
        "compile": "torch.compile: the first step takes a minute" if runtime.compile else "no",
        "capture": "CUDA graphs, one for each shape" if graphed else "no",
        **runtime.reasons,  # where something was measured, with that
        "output": options.output,
    }
    for name, value in lines.items():
        console.print(f"{name:>18}  {value}")
    for dataset in data:
        for line in dataset.annotations.corrections.lines():
            console.print(f"{dataset.annotation_file}: {line}")


def length_line(options: OptimizerOptions, schedule: Schedule) -> str:
    if options.minutes:
        return f"{options.minutes:g} minutes, evaluations apart: as many steps as then fit"
    return f"{options.epochs} epochs, {schedule.total_steps} steps"


def write_results(folder: RunFolder, evaluation: Evaluation, val_set: CocoDataset) -> None:
    """Write evaluation.json and the pictures."""
    write_evaluation(evaluation, val_set, folder.root)
    draw_loss_curves(folder.metrics, folder.plots / "loss.png")
    draw_ap_curves(folder.metrics, folder.plots / "ap.png")


def main(options: TrainOptions) -> int:
    runtime = choose_runtime(options.runtime)
    with joined_world(runtime.device) as world:
        return train(options, runtime, world)


if __name__ == "__main__":
    run(main, TrainOptions, default_options)
