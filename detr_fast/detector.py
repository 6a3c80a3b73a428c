"""A detector: a network with its classes, how it runs here, and the CUDA graphs of its forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from detr_kernels import OPERATIONS, Selection
from torch import Tensor, nn

from detr_fast.config import ModelConfig, UserError
from detr_fast.cuda_graphs import CudaCapturer, GraphCache
from detr_fast.data.annotations import Category
from detr_fast.data.batch import Batch
from detr_fast.host_memory import use_host_allocator
from detr_fast.model.backends import hand_out, reasons, select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import OptimizedDETR, optimized
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.postprocess import USUAL_THRESHOLDS, postprocess
from detr_fast.prediction import (
    Detections,
    ImageLike,
    keep_best,
    make_batch,
    prediction_batches,
    read_pixels,
    require_threshold,
)
from detr_fast.preprocessing import Preprocessing
from detr_fast.profiler_ranges import profiler_range
from detr_fast.runtime import Runtime

Forward = Callable[[Tensor, Tensor | None], dict[str, Any]]
"""Images (B, 3, H, W) and mask (B, H, W) or None -> at least `pred_logits` and `pred_boxes`."""

MOST_GRAPHS = 32
SMALL_BATCH_PX = 4_000_000
"""Pixels for which the GPU takes as long as the host takes to launch the forward pass, about 5 ms: four images of
800x1066. Such batches gain from a CUDA graph, larger ones little."""
WARM_UP_CALLS = {"small": 1, "large": 3}
"""Eager calls of a shape before it is captured, which costs as much as some forward passes (0.1 s)."""


class Detector:
    """Finds objects: `predict` on photographs, `detect` on batches; called on normalised images, it is its network.

    Move it by its own `to`: the CUDA graphs of its forward pass read the weights' memory. They have one input's memory,
    too: threads that predict at once need a detector each.
    """

    def __init__(
        self,
        network: DETR,
        categories: tuple[Category, ...] | None = None,
        notes: tuple[str, ...] = (),
        runtime: Runtime | None = None,
    ) -> None:
        """Take a network as it is, or as `place` has placed it for `runtime`."""
        self.network = network
        self.categories = categories
        """The category of each label, in label order; None: labels are the data set's own ids."""
        self.notes = notes
        """Sentences on what was assumed where its file did not say it."""
        self.graphs: GraphCache | None = None
        self._runtime = runtime
        self._captured_with: Any = None
        self._compiled: nn.Module | None = None

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def runtime(self) -> Runtime:
        """Return how it runs: as it was placed, else where the network is and in its own precision."""
        return self._runtime or runtime_of(self.network)

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Call the network: see `DETR.forward`."""
        with self.runtime.autocast():
            return self.network(images, mask)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out CUDA graphs and the compiled network, which belong to these weights' memory."""
        return {**self.__dict__, "graphs": None, "_captured_with": None, "_compiled": None}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the network as `nn.Module.to` does; from then on it runs where it is and as it is.

        Backends that were chosen for where it was are forgotten: each call chooses by its own tensors.
        """
        self.network.to(*args, **kwargs)
        hand_out(Selection(), self.network)
        self._replace(self.network, None)
        return self

    def optimize(self, runtime: Runtime) -> Self:
        """Place the network for `runtime` and, unless that says not to, optimise it for inference alone.

        See `detr_fast.model.optimized`: such a network cannot be trained.
        """
        network = place(self.network.eval(), runtime)
        if runtime.optimizes:
            network = optimized(network, runtime.dtype)
            explain_backends(network, runtime)  # a norm that is folded for good no longer runs
        self._replace(network, runtime)
        return self

    def predict(
        self, images: ImageLike | Sequence[ImageLike], threshold: float | None = None, batch_size: int = 1
    ) -> list[Detections]:
        """Find the objects with at least `threshold` as score on one photograph or several, one Detections each.

        `threshold`: default 0.7, of sigmoid scores 0.35.
        `images`: paths, PIL images or (H, W, 3) uint8 arrays. More than one a batch is faster: those of like shape
        share one, whatever their order here, and smaller ones are padded, which changes the numbers a little. The
        network's mode is restored. Raises UserError for what is no image, and for outputs that are not finite.
        """
        several = [images] if isinstance(images, ImageLike) else list(images)
        found: dict[int, Detections] = {}
        for indices in prediction_batches(self.config, several, batch_size):
            pixels = [read_pixels(several[index]) for index in indices]
            found.update(zip(indices, self.predict_batch(pixels, threshold), strict=True))
        return [found[index] for index in range(len(several))]

    def predict_batch(self, pixels: Sequence[Tensor], threshold: float | None = None) -> list[Detections]:
        """Find objects as `predict` does, on decoded images uint8 (3, h, w) in one batch."""
        threshold = self.least_score(threshold)
        on_host = [part.cpu() for part in self.detect(make_batch(self.config, pixels))]
        return [keep_best(self.categories, threshold, *one) for one in zip(*on_host, strict=True)]

    def least_score(self, asked: float | None) -> float:
        """Return the threshold that is asked for, or the usual one. Raises UserError for what is no score."""
        threshold = USUAL_THRESHOLDS[self.config.scores] if asked is None else asked
        require_threshold(threshold)
        return threshold

    @torch.no_grad()  # and not inference_mode: what a module might cache here must stay usable in training
    def detect(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (B, Q), labels (B, Q) and boxes xyxy (B, Q, 4) in pixels of the original images, on the device.

        A batch that does not fit into the memory is halved until it does. Raises UserError where one image does not.
        """
        runtime = self.runtime
        with profiler_range("copy"):
            batch = batch.to(runtime.device)
        with profiler_range("pixels"):
            images, mask = Preprocessing.of(self.network, runtime)(batch)
        with profiler_range("forward"), runtime.autocast(), evaluation_mode(self.network):
            logits, boxes = halved_to_fit(self.forward, images, mask, batch.image_ids)
        with profiler_range("postprocess"):
            return postprocess(logits, boxes, batch.original_sizes, self.config.scores)

    @property
    def replays(self) -> bool:
        """Tell whether forward passes are replayed as CUDA graphs: on a GPU, where the network is optimised.

        A compiled one is not: it may compile anew at any call, which no capture could hold.
        """
        runtime = self.runtime
        if runtime.compile or runtime.capture is False:
            return False
        on_gpu = runtime.device.type == "cuda"
        return self.graphs is not None or (on_gpu and isinstance(self.network, OptimizedDETR))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Compute at least `pred_logits` and `pred_boxes`, by CUDA graph replay or compiled, where it runs so.

        Call the network itself for hooks, profilers and exports: a replay runs no Python.
        """
        if self.replays:
            return self._replayed(images, mask)
        if not self.runtime.compile:
            return self.network(images, mask)
        if self._compiled is None:
            self._compiled = torch.compile(self.network)  # type: ignore[assignment]
        return self._compiled(images, mask)  # type: ignore[misc]

    def _replace(self, network: DETR, runtime: Runtime | None) -> None:
        """Set the network and its runtime; drop the graphs and the compiled network of the last one."""
        self.network, self._runtime = network, runtime
        self.graphs, self._captured_with, self._compiled = None, None, None

    def _replayed(self, images: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Compute `pred_logits` and `pred_boxes` from the graph cache; later calls do not change them.

        A small batch's shape is captured at its second call, a large one's at its fourth.
        """
        network = self.network  # which the function below holds, and not the detector that holds its graph
        captured_with = network.selection, next(network.parameters()).data_ptr()
        if self.graphs is None:
            self.graphs = GraphCache(CudaCapturer(self.runtime.device), MOST_GRAPHS)
        elif self._captured_with not in (None, captured_with):  # somebody moved the network itself
            self.graphs.forget()
        self._captured_with = captured_with

        def last_layer(given: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
            outputs = network(*given)
            return {name: outputs[name] for name in ("pred_logits", "pred_boxes")}

        batch, _, height, width = images.shape
        size = "small" if batch * height * width <= SMALL_BATCH_PX else "large"
        return self.graphs(last_layer, (images, mask), WARM_UP_CALLS[size])


def place(network: DETR, runtime: Runtime, named: Mapping[str, str] | None = None) -> DETR:
    """Move `network` to the device, in the memory order and with the backends that `runtime` chose; returns it.

    `named`: backends of single operations, before what the options ask for. Settings of the whole process, the host's
    allocator and the threads of torch's operators, are made as well.
    """
    configure_process(runtime)
    memory_format = torch.channels_last if runtime.channels_last else torch.contiguous_format
    network.to(device=runtime.device, memory_format=memory_format)  # type: ignore[call-overload]
    select_backends(
        network,
        runtime.kernels,
        runtime.attention,
        runtime.dtype,
        named=named,
        measured=runtime.measured,
        compiled=runtime.compile,
    )
    explain_backends(network, runtime)
    return network


def explain_backends(network: DETR, runtime: Runtime) -> None:
    """Write into `runtime.reasons` which backends `network` runs, in the mode that it is in, and no others."""
    for operation in OPERATIONS.values():
        runtime.reasons.pop(operation.title, None)
    runtime.reasons.update(reasons(network, network.selection, network.training))


def configure_process(runtime: Runtime) -> None:
    """Set the host's allocator and torch's threads, which `runtime` chose for the whole process."""
    use_host_allocator(runtime.host_allocator)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)


def runtime_of(network: nn.Module) -> Runtime:
    """Describe a network where it is and as it is: not compiled, in its weights' dtype."""
    weight = next(network.parameters())
    return Runtime(
        device=weight.device,
        dtype=weight.dtype,
        channels_last=isinstance(network, OptimizedDETR),
        compile=False,
        kernels="auto",
        attention="auto",
        reasons={},
    )


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Switch dropout and live batch norm off, until the context ends: each module's mode is then as it was."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def halved_to_fit(
    forward: Forward, images: Tensor, mask: Tensor | None, image_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the last layer's logits and boxes of a batch, halved until it fits into the memory.

    Its padding stays, so that the numbers do not depend on it. Raises UserError where a single image does not fit.
    """
    try:
        outputs = forward(images, mask)
        return outputs["pred_logits"], outputs["pred_boxes"]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(images) == 1:
            height, width = images.shape[-2:]
            raise UserError(
                f"Image {image_ids[0]} ({width}x{height} pixels) does not fit into the device's memory. Give a smaller "
                "--image-size and --max-size."
            ) from error
    half = len(images) // 2
    halves = [
        halved_to_fit(forward, images[some], None if mask is None else mask[some], image_ids[some])
        for some in (slice(None, half), slice(half, None))
    ]
    logits, boxes = zip(*halves, strict=True)
    return torch.cat(logits), torch.cat(boxes)
