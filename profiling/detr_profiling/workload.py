"""What is measured: training steps or inferences of a model, on batches that are the same for all."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
import tyro
from detr_kernels import PackedImages
from torch import nn

from detr_fast.config import MODELS, ModelConfig, model_config, require
from detr_fast.data.batch import Batch, Targets
from detr_fast.data.loader import on_device
from detr_fast.detector import Detector, place
from detr_fast.model.backends import hand_out
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.option_groups import Idle
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import Runtime, choose_device, choose_runtime
from detr_fast.stages import stage
from detr_fast.training.assembly import shape_step_px
from detr_fast.training.criterion import SetCriterion, build_criterion
from detr_fast.training.graphed_step import GraphedStep, why_not_graphed
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.optimizer import build_optimizer
from detr_fast.training.step import TrainStep
from detr_fast.weights import export_state_dict, load_state_dict
from detr_profiling.measuring.timing import STEADY_AFTER
from detr_profiling.mixed_sizes import BatchShape, typical_shapes
from detr_profiling.observation import Observation, observe_captured_step, observe_model
from detr_profiling.reference.keyed_weights import mild_state_dict

Mode = Literal["training", "inference"]
Given = TypeVar("Given")

SOURCE_FRACTION = 0.6
"""Side of a photograph over the side that it is resized to: 480x640 becomes 800x1066, as with most of COCO."""
EXACT_LEVELS = 16
"""Pixels that are multiples of it stay whole numbers where a side is doubled bilinearly, at every step of the way."""
MOST_OBSERVED = 4
"""Images whose outputs and gradients are compared."""


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions(RuntimeOptions):
    """What to run: any model, size and batch, with any backend."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(
            "buckets",
            lambda o: not o.mixes_sizes,
            "where all images have one size: give --size-mix mixed, or in trace --data",
        ),
        Idle("objects", lambda o: o.mode == "inference", "with --mode inference: give --mode training"),
        Idle("dropout", lambda o: o.mode == "inference", "with --mode inference: give --mode training"),
        Idle("capture", lambda o: o.capture and o.resolved().device == "cpu", "on a CPU: give --device cuda"),
    )
    model: str = "detr_r50"
    """detr_r50, detr_r50_dc5, detr_r101, detr_r101_dc5, detr_tiny, or a timm backbone's name."""
    num_classes: int | None = None
    """Default: the model's (91); likewise the next three."""
    num_queries: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    source_position: bool | None = None
    """Add positions to the encoder's input too; default: as the model does."""
    mode: Mode = "training"
    """A whole training step, or inference."""
    size: str = "auto"
    """Height and width in pixels that the images are resized to, as in 800x1066, from 0.6 of it; auto: that on a GPU,
    320x427 on a CPU."""
    size_mix: Literal["same", "mixed"] = "same"
    """mixed: as in training on COCO, of which --size then gives the largest shorter side; four batches that stand for
    an epoch's are timed. What is compared with the reference always has one size."""
    batch_size: int | None = None
    """Images a step; default: 16 on a GPU, 1 on a CPU."""
    buckets: bool = True
    """Where sizes are mixed: batches of images of like shape, so that little is padding; without, of any."""
    objects: int = 7
    """Most objects on an image."""
    dropout: float | None = None
    """Default: the model's (0.1)."""
    compile: bool = False
    """Compile the model with torch.compile; needs a C++ compiler on a CPU."""
    channels_last: bool = True
    """Convolutions in NHWC order."""
    tune: tyro.conf.Suppress[bool] = False
    """False: what is measured runs as the options say."""
    capture: bool = False
    """Replay the training step, or an optimised model's inference, as a CUDA graph."""
    optimize: bool | None = None
    """Fold and round weights once for inference, as evaluate and predict do; default: unless --kernels ref."""
    threads: int | None = None
    """Threads of torch's operators on a CPU; default: torch's choice."""
    seed: int = 42
    """Of weights, photographs, boxes and dropout."""

    def __post_init__(self) -> None:
        require(
            self.size == "auto" or re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size) is not None,
            f"--size must be HEIGHTxWIDTH, such as 800x1066, or auto, not {self.size!r}.",
        )
        require(self.batch_size is None or self.batch_size >= 1, f"--batch-size {self.batch_size}: at least 1.")
        require(self.objects >= 1, f"--objects {self.objects}: at least 1.")
        require(self.threads is None or self.threads >= 1, f"--threads {self.threads}: at least 1.")

    @property
    def mixes_sizes(self) -> bool:
        """Tell whether batches are made of images of several sizes."""
        return self.size_mix == "mixed"

    def resolved(self) -> "WorkloadOptions":
        """These alone, without what a command adds, and with what `auto` stands for on this device, but for how
        operations run."""
        device, _ = choose_device(self.device)
        size, images = ("800x1066", 16) if device.type == "cuda" else ("320x427", 1)
        return replace(
            self.part(WorkloadOptions),
            device=device.type,  # type: ignore[arg-type]
            size=size if self.size == "auto" else self.size,
            batch_size=self.batch_size or images,
            threads=self.threads or torch.get_num_threads(),
        )

    def observed(self) -> "WorkloadOptions":
        """With the images that are compared: in float64, which the oracle needs, more would not fit. All of one size,
        since padding itself changes a little of what DETR computes."""
        options = self.resolved()
        return replace(options, size_mix="same", batch_size=min(options.batch_size or 1, MOST_OBSERVED))

    @property
    def height_width(self) -> tuple[int, int]:
        height, width = self.resolved().size.split("x")
        return int(height), int(width)

    def architecture(self) -> ModelConfig:
        names = ("num_classes", "num_queries", "encoder_layers", "decoder_layers", "source_position", "dropout")
        asked = {name: getattr(self, name) for name in names}
        return model_config(self.model, **{name: value for name, value in asked.items() if value is not None})


@dataclass
class Workload:
    """One model with its batches, ready to run again and again."""

    name: str
    options: WorkloadOptions
    model: nn.Module
    run: Callable[[], Any]
    """One whole step with each batch, from the photographs to the last write; does not wait for a GPU, to which batches
    are copied one ahead."""
    observe: Callable[[], Observation] | None = None
    """The same numbers at every call: without dropout, and without an optimizer's step; losses and gradients of a
    captured step, and the outputs of a captured inference, as a replay leaves them. None: not comparable."""
    reasons: dict[str, str] = field(default_factory=dict)
    """What runs as what, and why."""
    step: Callable[[Batch], Any] | None = None
    """One step with a batch that lies on the host. None: with the workload's own batches alone."""

    @property
    def shapes(self) -> list[BatchShape]:
        """Of the batches of one run."""
        return batch_shapes(self.options)

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def batch_shapes(options: WorkloadOptions) -> list[BatchShape]:
    """One batch, the later half of whose images is an eighth narrower; or those that stand for mixed sizes."""
    options = options.resolved()
    (height, width), images = options.height_width, options.batch_size or 1
    if options.size_mix == "same":
        narrow = [index >= (images + 1) // 2 for index in range(images)]
        return [BatchShape([(height, width - width // 8 * less) for less in narrow], (height, width))]
    step = shape_step_px(options.device, options.compile) if options.buckets else 1
    shapes = typical_shapes(images, options.seed, options.buckets, min(height, width))
    return [shape.in_steps(step) for shape in shapes]


def make_batches(options: WorkloadOptions, num_classes: int) -> list[Batch]:
    """Draws photographs and boxes on the host, pinned beside a GPU; detr_tiny's have their size already, as those of
    the embedded data set that it is for."""
    fraction = 1.0 if options.model == "detr_tiny" else SOURCE_FRACTION
    generator = torch.Generator().manual_seed(options.seed)
    batches = []
    for shape in batch_shapes(options):
        sources = [(max(1, round(fraction * h)), max(1, round(fraction * w))) for h, w in shape.sizes]
        mirrored = options.mode == "training"
        batches.append(draw_batch(shape, sources, mirrored, options.objects, num_classes, generator))
    return [batch.pin_memory() for batch in batches] if options.resolved().device == "cuda" else batches


def observed_batch(options: WorkloadOptions, num_classes: int) -> Batch:
    """Draws what is compared with the reference, on the host.

    Photographs' sides are doubled, or kept where the result is odd, and their levels are such that nothing has to be
    rounded: elsewhere an implementation that rounds once and one that rounds after each axis differ by a level.
    """
    options = options.observed()
    generator = torch.Generator().manual_seed(options.seed)
    [shape] = batch_shapes(options)
    sources = [(exact_source_side(h), exact_source_side(w)) for h, w in shape.sizes]
    return draw_batch(shape, sources, True, options.objects, num_classes, generator, EXACT_LEVELS)


def exact_source_side(side: int) -> int:
    """Returns the side from which one of `side` pixels is resized without rounding."""
    return side if side % 2 else side // 2


def draw_batch(
    shape: BatchShape,
    sources: Sequence[tuple[int, int]],
    mirrored: bool,
    objects: int,
    num_classes: int,
    generator: torch.Generator,
    level_step: int = 1,
) -> Batch:
    """Draws photographs of the sizes `sources` that become those of `shape`, with `mirrored` every other one mirrored;
    levels are multiples of `level_step`, objects on each at most `objects`."""
    images = len(shape.sizes)
    photographs = [
        torch.randint(256 // level_step, (*size, 3), dtype=torch.uint8, generator=generator) * level_step
        for size in sources
    ]
    low = torch.rand(images, objects, 2, generator=generator) * 0.6
    extent = torch.rand(images, objects, 2, generator=generator) * 0.3 + 0.05
    labels = torch.randint(num_classes, (images, objects), generator=generator)
    counts = torch.randint(1, objects + 1, (images,), generator=generator)
    targets = Targets(labels, torch.cat((low + extent / 2, extent), -1), counts)
    packed = PackedImages.of_list(photographs, shape.sizes, [mirrored and index % 2 == 1 for index in range(images)])
    return Batch(packed, shape.room, targets, list(range(images)), torch.tensor(sources))


def copied_ahead(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """Yields the batches on `device`, over and over; on a GPU one is copied ahead beside the step, as in training."""
    return on_device(itertools.cycle(batches), device)


def stepping(step: Callable[[Given], Any], feed: Iterator[Given], steps: int) -> Callable[[], Any]:
    """Makes a run of `steps` steps, each with the next of `feed`; it returns the last one's result."""

    def run() -> Any:
        for _ in range(steps):
            with stage("copy"):
                given = next(feed)
            result = step(given)
        return result

    return run


def initial_model(options: WorkloadOptions) -> DETR:
    """On the CPU, its weights from the seed alone, norms and biases not 1 and 0, so that every term shows."""
    torch.manual_seed(options.seed)
    model = DETR(options.architecture())
    if options.model in MODELS and options.model != "detr_tiny":
        load_state_dict(model, mild_state_dict(export_state_dict(model, "facebook"), options.seed))
    return model


def build_workload(options: WorkloadOptions, backends: Mapping[str, str] | None = None) -> Workload:
    """Build ours; `backends`: of single operations, where they are to be other than the options make them.

    Raises UserError where something asked for by name is not there.
    """
    options = options.resolved()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    runtime = choose_runtime(options)
    model = place(initial_model(options).train(options.mode == "training"), runtime, backends)
    if options.mode == "inference" and runtime.optimizes:
        model = optimized(model, runtime.dtype)
    criterion = build_criterion(model.config.num_classes)
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
            for _ in range(STEADY_AFTER["cuda"] if options.capture and options.mode == "inference" else 1):
                found = observe_model(model, forward, criterion, observed, runtime)
            if options.capture and options.mode == "training":
                found |= observe_captured_step(model, criterion, observed, runtime)
        return found

    return Workload("detr_fast", options, model, run, observe, runtime.reasons, step)


def training_step(
    model: DETR, criterion: SetCriterion, options: WorkloadOptions, runtime: Runtime
) -> tuple[Callable[[Batch], Any], Any]:
    """Makes a step with one batch, and returns it and what it calls in the model's place. Raises UserError where it
    cannot be captured."""
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    step = TrainStep(model, criterion, optimizer, runtime)
    if not options.capture:
        return lambda batch: step([batch]), step.forward
    problem = why_not_graphed(step)
    require(problem is None, f"--capture cannot be done: {problem}.")
    graphed = GraphedStep(MicroBatches(step))
    return lambda batch: graphed([batch]), step.forward


def inference_step(model: DETR, options: WorkloadOptions, runtime: Runtime) -> tuple[Callable[[Batch], Any], Any]:
    """Does the same for an inference."""
    # without --capture no replay, which evaluation on a GPU is by default: hooks and the names of stages stay
    detector = Detector(model, runtime=replace(runtime, capture=options.capture))
    replays = detector.replays or not options.capture
    require(replays, "--capture takes an optimised model on a GPU, without --compile.")
    return detector.detect, detector.forward
