"""`python -m detr_profiling parity`: is it still DETR? Ours against the plain reference, from blocks to AP."""

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
import tyro

from detr_fast.config import UserError, require
from detr_fast.console import Console
from detr_fast.option_groups import Idle, Options
from detr_fast.options import ArchitectureOptions, Output, Precision
from detr_profiling.baselines.build import build_baseline
from detr_profiling.comparison.average_precision import AveragePrecision, Images, checkpoint_and_images
from detr_profiling.comparison.blocks import observe_with_blocks
from detr_profiling.comparison.curve import TrainingCurve, make_task
from detr_profiling.comparison.judgement import Row, judge
from detr_profiling.comparison.optimizer_step import observe_step
from detr_profiling.comparison.own_outputs import targets_of
from detr_profiling.comparison.record import ParityRecord
from detr_profiling.comparison.variants import Variant, build_variants
from detr_profiling.measuring.machine import describe_machine
from detr_profiling.observation import Observation
from detr_profiling.own_workload import build_workload
from detr_profiling.pages.parity import parity_sections
from detr_profiling.pages.results import PARITY_FILE
from detr_profiling.pages.terminal import show
from detr_profiling.workload import MOST_OBSERVED, OneSizeOptions, Workload, WorkloadOptions


@dataclass(frozen=True, kw_only=True)
class UnbatchedOptions(OneSizeOptions):
    """Leave no choice: padding itself changes a little of what DETR computes."""

    buckets: tyro.conf.Suppress[Literal[True]] = True


@dataclass(frozen=True, kw_only=True)
class ExactArchitectureOptions(ArchitectureOptions):
    """Choose the model; all that is compared is without dropout."""

    dropout: tyro.conf.Suppress[None] = None


@dataclass(frozen=True, kw_only=True)
class ParityOptions(Options):
    """Every block, output, loss, gradient and match, an optimizer step, a training curve and AP, held against the plain
    reference with the same weights; in inference also Hugging Face's DETR."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(
            "batch_size",
            lambda o: o.workload.batch_size > MOST_OBSERVED,
            f"above {MOST_OBSERVED}, the images that are compared: give a smaller one",
        ),
    )
    output: Output = "runs/profile"
    """Folder for parity.json."""
    data: str = "shapes:64"
    """For the training curve and AP: a folder in COCO layout, or shapes:SIDE, the embedded data set."""
    curve_model: str = "detr_tiny"
    """Model that the training curve trains, by its recipe without dropout."""
    steps: int = 40
    """Steps of the training curve, all on one batch."""
    weights: str | None = None
    """A checkpoint whose AP on the validation images of --data is compared; default: the weights that the training
    curve leaves, on the images that they were trained on."""

    workload: WorkloadOptions = WorkloadOptions(network=ExactArchitectureOptions(), mix=UnbatchedOptions())

    def __post_init__(self) -> None:
        require(self.steps >= 2, f"--steps {self.steps}: at least 2, the second shows what the first did.")


def observe_all(workload: Workload, gradients: Observation | None = None) -> Observation:
    """Observe blocks and what `observe` gives; of a training step also what a step does, by the exact `gradients`,
    default: the workload's own."""
    found = observe_with_blocks(workload)
    if workload.options.mode == "training":
        found |= observe_step(workload, gradients or found)
    return found


def last_layer(found: Observation) -> Observation:
    """Keep the last layer's outputs, which are an inference's."""
    return {name: found[name][-1:] for name in ("logits", "boxes")}


class OutputParity:
    """Compares variants of a workload, one after another, with the reference on the same batch."""

    def __init__(self, options: WorkloadOptions) -> None:
        self.plain = options.but(precision="fp32", compile=False, kernels="auto", attention="auto")
        self.reference = observe_all(build_baseline("reference", self.plain, torch.float64)) | targets_of(self.plain)
        self.eager: dict[Precision, Observation] = {}

    def eager_in(self, precision: Precision) -> Observation:
        if precision not in self.eager:
            baseline = build_baseline("reference", self.plain.but(precision=precision))
            self.eager[precision] = observe_all(baseline, self.reference)
        return self.eager[precision]

    def compare(self, variant: Variant) -> tuple[Observation, list[Row]]:
        """Return what it computes, and the verdicts. Raises UserError where it cannot run."""
        options, reference, eager = variant.options, self.reference, self.eager_in(variant.options.runtime.precision)
        if variant.baseline:
            observe = build_baseline(variant.baseline, options).observe
            assert observe is not None
            found = observe()
            return found, judge(found, last_layer(reference), last_layer(eager))
        found = observe_all(build_workload(options), reference)
        if options.runtime.compile:
            reference, eager = (
                {name: value for name, value in side.items() if not name.startswith("block ")}
                for side in (reference, eager)
            )
        return found, judge(found, reference, eager)


class Parity:
    """Compares outputs, training and AP; each part computes the reference's side when it is first asked for.

    Raises UserError for data or weights that cannot be read, before anything takes long.
    """

    def __init__(self, options: ParityOptions, record: ParityRecord) -> None:
        self.options, self.record, self.workload = options, record, options.workload.observed()
        self.device = torch.device(self.workload.runtime.device)
        self.task = make_task(options.data, options.curve_model, self.workload.seed)
        self.checkpoint = checkpoint_and_images(options.weights, options.data) if options.weights else None

    @cached_property
    def outputs(self) -> OutputParity:
        return OutputParity(self.workload)

    @cached_property
    def curve(self) -> TrainingCurve:
        return TrainingCurve(self.task, self.device, self.options.steps)

    @cached_property
    def average_precision(self) -> AveragePrecision:
        if self.checkpoint:
            return AveragePrecision(*self.checkpoint, self.device)
        images = Images(f"{self.options.data}, those of the curve", self.task.dataset, lambda: [self.task.batch])
        return AveragePrecision(self.curve.trained, images, self.device)

    def compare_outputs(self, variant: Variant) -> None:
        """Compare blocks, outputs and gradients. A variant that cannot run is left out; one that was asked for by name
        raises UserError."""
        try:
            found, rows = self.outputs.compare(variant)
        except UserError as error:
            if variant.asked:
                raise
            self.record.left_out[variant.name] = str(error)
        else:
            self.record.add(variant, found, rows, self.outputs.reference)
        self.finish_part()

    def compare_training(self, variant: Variant) -> None:
        """Compare the curve and AP."""
        self.curve.add(variant.name, variant.options.runtime)
        self.record.curve = self.curve.to_dict()
        self.average_precision.add(variant.name, variant.options.runtime)
        self.record.ap = self.average_precision.to_dict()
        self.finish_part()

    def finish_part(self) -> None:
        """Write what there is, and let go of the variant's memory and compiled code, of which torch keeps little."""
        self.record.write()
        torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def main(options: ParityOptions) -> int:
    workload, console = options.workload.observed(), Console()
    variants = build_variants(workload)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # it leaves fp32 ten bits
    torch.set_num_threads(workload.runtime.threads or torch.get_num_threads())
    machine = describe_machine(torch.device(workload.runtime.device)).to_dict()
    record = ParityRecord(Path(options.output) / PARITY_FILE, machine, {"name": "detr_fast", **workload.to_dict()})
    parity = Parity(options, record)
    for compiled in (False, True):  # first what takes no minutes
        group = [variant for variant in variants if variant.options.runtime.compile == compiled]
        for variant in group:
            with console.status(f"{variant.name}: blocks, outputs, gradients"):
                parity.compare_outputs(variant)
        for variant in group:
            if variant.trains and variant.name not in record.left_out:
                with console.status(f"{variant.name}: training curve and AP"):
                    parity.compare_training(variant)
    record.finished = True
    record.write()
    show(parity_sections(record.to_dict()), console)
    console.print(f"{record.path} holds all of it.")
    return 0 if record.close else 1
