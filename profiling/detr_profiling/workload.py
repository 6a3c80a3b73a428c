"""The measured work: training steps or inferences of a model, on batches that are the same for all implementations."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
import tyro
from torch import nn

from detr_fast.config import require
from detr_fast.data.batch import Batch
from detr_fast.option_groups import Idle, Options
from detr_fast.options import ArchitectureOptions, RuntimeOptions
from detr_fast.profiler_ranges import profiler_range
from detr_fast.runtime import choose_device
from detr_profiling.observation import Observation

Mode = Literal["training", "inference"]
Given = TypeVar("Given")
MOST_OBSERVED = 4
"""Images whose outputs and gradients are compared."""


@dataclass(frozen=True, kw_only=True)
class SizeMixOptions(Options):
    """Choose whether images have several sizes, and how these are batched."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("buckets", lambda o: o.size_mix == "same", "where all images have one size: give --size-mix mixed"),
    )
    size_mix: Literal["same", "mixed"] = "same"
    """mixed: as in training on COCO, of which --size then gives the largest shorter side; four batches that stand for
    an epoch's are timed. What is compared with the reference always has one size."""
    buckets: bool = True
    """Where sizes are mixed: batches of images of like shape, so that little is padding; without, of any."""


@dataclass(frozen=True, kw_only=True)
class OneSizeOptions(SizeMixOptions):
    """Choose how a data set's images are batched, where the workload's own have one size."""

    idle: ClassVar[tuple[Idle, ...]] = ()
    size_mix: tyro.conf.Suppress[Literal["same"]] = "same"


@dataclass(frozen=True, kw_only=True)
class OpenRuntimeOptions(RuntimeOptions):
    """Choose device, precision and backends; what is not given is left open, for `tune` to try."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle(
            "capture",
            lambda o: o.capture and choose_device(o.device)[0].type == "cpu",
            "on a CPU: give --device cuda",
        ),
    )
    switches: ClassVar[tuple[str, ...]] = (*RuntimeOptions.switches, "capture", "threads", "optimize")
    compile: bool | None = None
    """If given, as --channels-last and --capture, it is not tried but taken as it is; the entry then serves runs that
    ask for it."""
    channels_last: bool | None = None
    tune: tyro.conf.Suppress[bool] = False
    """False: what is measured runs as the options say."""
    capture: bool | None = None
    optimize: bool | None = None
    """Fold and round weights once for inference, as evaluate and predict do; default: unless --kernels ref."""
    threads: int | None = None
    """Threads of torch's operators on a CPU; default: torch's choice."""

    def __post_init__(self) -> None:
        require(self.threads is None or self.threads >= 1, f"--threads {self.threads}: at least 1.")


@dataclass(frozen=True, kw_only=True)
class WorkloadRuntimeOptions(OpenRuntimeOptions):
    """Choose device, precision and backends of what is measured."""

    compile: bool = False
    """Compile the model with torch.compile; needs a C++ compiler on a CPU."""
    channels_last: bool = True
    """Convolutions in NHWC order."""
    capture: bool = False
    """Replay the training step, or an optimised model's inference, as a CUDA graph."""


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions(Options):
    """Names the work to run: any model, size and batch, with any backend."""

    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("objects", lambda o: o.mode == "inference", "with --mode inference: give --mode training"),
        Idle("dropout", lambda o: o.mode == "inference", "with --mode inference: give --mode training"),
    )
    mode: Mode = "training"
    """A whole training step, or inference."""
    size: str = "auto"
    """Height and width in pixels that the images are resized to, as in 800x1066, from 0.6 of it; auto: that on a GPU,
    320x427 on a CPU."""
    batch_size: int | None = None
    """Images a step; default: 16 on a GPU, 1 on a CPU."""
    objects: int = 7
    """Most objects on an image."""
    seed: int = 42
    """Seed of weights, photographs, boxes and dropout."""

    network: ArchitectureOptions = ArchitectureOptions()
    mix: SizeMixOptions = SizeMixOptions()
    runtime: OpenRuntimeOptions = WorkloadRuntimeOptions()

    def __post_init__(self) -> None:
        require(
            self.size == "auto" or re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size) is not None,
            f"--size must be HEIGHTxWIDTH, such as 800x1066, or auto, not {self.size!r}.",
        )
        require(self.batch_size is None or self.batch_size >= 1, f"--batch-size {self.batch_size}: at least 1.")
        require(self.objects >= 1, f"--objects {self.objects}: at least 1.")

    def resolved(self) -> "WorkloadOptions":
        """Return these options with device, size, batch and threads for `auto`, in the groups of any workload.

        How operations run stays as it was asked for.
        """
        device, _ = choose_device(self.runtime.device)
        size, images = ("800x1066", 16) if device.type == "cuda" else ("320x427", 1)
        chosen = {
            "device": device.type,
            "size": size if self.size == "auto" else self.size,
            "batch_size": self.batch_size or images,
            "threads": self.runtime.threads or torch.get_num_threads(),
        }
        return WorkloadOptions.of(**self.to_dict() | chosen)

    def observed(self) -> "WorkloadOptions":
        """Return the options of what is compared: at most 4 images, as float64 takes memory, all of one size.

        Padding itself changes a little of what DETR computes.
        """
        options = self.resolved()
        return options.but(size_mix="same", batch_size=min(options.batch_size or 1, MOST_OBSERVED))

    @property
    def height_width(self) -> tuple[int, int]:
        height, width = self.resolved().size.split("x")
        return int(height), int(width)


@dataclass
class Workload:
    """Holds one model with its batches, ready to run again and again."""

    name: str
    options: WorkloadOptions
    model: nn.Module
    run: Callable[[], Any]
    """One whole step with each batch, from the photographs to the last write; does not wait for a GPU, to which batches
    are copied one ahead."""
    observe: Callable[[], Observation] | None = None
    """Returns equal numbers at every call, since it runs without dropout and without an optimizer step: losses and
    gradients of a captured step, and outputs of a captured inference, as a replay leaves them. None: not comparable."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Setting or operation -> what was chosen for it, and why."""
    step: Callable[[Batch], Any] | None = None
    """One step with a batch that lies on the host. None: with the workload's own batches alone."""
    fetch: Callable[[], None] = lambda: None
    """Gets the batch that `run` takes next from a loader; nothing where `run` has its own."""
    data: str | None = None
    """The data set that the loader reads."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.runtime.device)

    def to_dict(self) -> dict[str, Any]:
        """Return name, options and data set, as a file of results holds them."""
        return {"name": self.name, **self.options.to_dict(), **({"data": self.data} if self.data else {})}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def stepping(step: Callable[[Given], Any], feed: Iterator[Given], steps: int) -> Callable[[], Any]:
    """Make a run of `steps` steps, each with the next of `feed`; it returns the last one's result."""

    def run() -> Any:
        for _ in range(steps):
            with profiler_range("copy"):
                given = next(feed)
            result = step(given)
        return result

    return run
