"""One optimizer step: the one place where outputs become updates, and where a captured form can take over."""

import math
import operator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.distributed as dist
from detr_kernels import choose_assignment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detr_fast.config import require
from detr_fast.data.batching import Batch, model_input
from detr_fast.data.targets import Targets
from detr_fast.model.detr import DETR
from detr_fast.recording import CudaRecorder, Recorder
from detr_fast.runtime import Runtime
from detr_fast.stages import stage
from detr_fast.training.captured import CapturedStep, StepInput, Terms
from detr_fast.training.criterion import Normalizers, SetCriterion
from detr_fast.training.distributed import World
from detr_fast.training.forward_state import ForwardState
from detr_fast.training.meter import TermSums


@dataclass
class TrainStep:
    """Forward, loss and backward over a window of batches, then clip, AdamW and the average. Reads nothing on the host.

    The window's batches and all ranks share one set of normalizers, so the step is that of their joined batch; but for
    live batch norm, whose statistics are each batch's own. SciPy's assignment, where it is used on a GPU, is the
    exception: it works on the host.
    """

    model: DETR
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    runtime: Runtime
    world: World = field(default_factory=World)
    clip: float = 0.1
    averaged: DETR | None = None
    ema_decay: float = 0.0
    parts: int = 1
    """How many pieces each batch is computed in, one after another, to fit into the memory; the step is the same, but
    for live batch norm."""

    def __post_init__(self) -> None:
        self.captured: CapturedStep | None = None
        self.sums = TermSums()
        self.model.implementation.apply_to(self.criterion)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.synchronized: nn.Module = self.model
        if self.world.size > 1:
            devices = [self.world.local_rank] if self.runtime.device.type == "cuda" else None
            self.synchronized = DistributedDataParallel(
                self.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.forward = self._compiled(self.synchronized)

    def __call__(self, batches: list[Batch]) -> Terms:
        """The step's terms as device scalars, of all its batches on this rank, and `grad_norm` before clipping.

        Where the memory runs out, `parts` is doubled and the gradients are computed again, as if that had been so from
        the step's beginning; UserError where single images do not fit. Not so, but torch's error: of several processes,
        as the others would wait for the gradients of one that begins again, and of a captured step.
        """
        if self.captured is not None:
            return self.captured(*self._window(batches))
        with stage("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        return self._gradients_that_fit(batches) | self.update()

    def capture(self, recorder: Recorder | None = None) -> None:
        """From now on steps are recorded and replayed as CUDA graphs, one for each shape; the numbers stay the same.

        `recorder`: what records them; default: CUDA graphs, for which `why_not_captured` must be None.
        """
        device = self.runtime.device
        if self.world.size > 1:  # DistributedDataParallel would exchange gradients within the backward pass
            self.synchronized = self.model
            self.forward = self._compiled(self.model)
        for group in self.optimizer.param_groups:
            # read where it lies at each replay
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = device.type == "cuda"
        self.captured = CapturedStep(
            self.gradients, self.update, self.trained, self.world, recorder or CudaRecorder(device)
        )

    def why_not_captured(self) -> str | None:
        """Why its steps cannot be CUDA graphs; None where they can."""
        device = self.runtime.device
        if device.type != "cuda":
            return f"CUDA graphs do not run on {device.type}"
        if choose_assignment(device, self.criterion.implementation.assignment)[0] == "scipy":
            return "SciPy's assignment works on the host: --kernels auto"
        if self.model.transformer.checkpoint_activations:
            return "--checkpoint-activations puts dropout's random state back, which a replay would not do"
        return None

    def gradients(self, inputs: list[StepInput], normalizers: Tensor) -> Terms:
        """Of a window's batches on the device, added to what `.grad` holds; returns their terms, and adds them to
        `sums`. Nothing here or in `update` is read on the host or comes from it."""
        terms: Terms = {}
        for index, (images, mask, *targets) in enumerate(inputs):
            with self._gradients_later(index < len(inputs) - 1):
                part = self._backward(images, mask, Targets(*targets), Normalizers(*normalizers.unbind()))
            with stage("loss"):
                for name, value in part.items():
                    share = value / len(inputs) if "error" in name else value  # losses are shares of the joined batch's
                    terms[name] = terms[name] + share if name in terms else share
        with stage("loss"):
            self.sums.add(terms)
        return terms

    def update(self) -> Terms:
        """The optimizer's step and the average, from the gradients that lie in `.grad`. The scale of fp16's loss stays
        on the device as well: fused AdamW is told there whether to skip."""
        with stage("optimizer"):
            self.scaler.unscale_(self.optimizer)
            clip = self.clip or float("inf")
            norm = nn.utils.get_total_norm([each.grad for each in self.trained if each.grad is not None])
            skipped = (~norm.isfinite()).float()
            if self.scaler.is_enabled():
                nn.utils.clip_grads_with_norm_(self.trained, clip, norm)
            else:
                # AdamW looks at both on the device: it divides as it reads, and changes nothing where it is to skip
                self.optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1)  # type: ignore[attr-defined]
                self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.averaged is not None:
                self._average()
            terms = {"grad_norm": norm, "skipped": skipped}
            self.sums.add(terms)
        return terms

    def fit(self, batch: Batch) -> None:
        """Doubles `parts` until a batch as large as `batch` fits into the memory of every rank. Nothing is trained.

        Raises UserError where single images do not fit.
        """
        while self._any_rank(not self._fits(batch)):
            self._halve([batch])

    def _fits(self, batch: Batch) -> bool:
        """Whether its parts' gradients can be computed here; buffers and random numbers are as before afterwards."""
        before = ForwardState(self.model, self.runtime.device)
        normalizers = Normalizers(*torch.ones(2, device=self.runtime.device).unbind())
        try:
            with self._gradients_later(True):
                for part in batch.split(self.parts):
                    images, mask, *targets = self._input(part)
                    self._backward(images, mask, Targets(*targets), normalizers)
        except torch.OutOfMemoryError:
            return False
        finally:
            self._begin_again(before)
        return True

    def _gradients_that_fit(self, batches: list[Batch]) -> Terms:
        with stage("forward"):
            before = ForwardState(self.model, self.runtime.device)
        while True:
            try:
                return self.gradients(*self._window(batches))
            except torch.OutOfMemoryError:
                if self.world.size > 1:
                    raise
            self._halve(batches)
            self._begin_again(before)  # outside of the handler, whose traceback keeps what was computed

    def _halve(self, batches: list[Batch]) -> None:
        height, width = max((batch.room for batch in batches), key=math.prod)
        require(
            self.parts < max(len(batch.images) for batch in batches),
            f"A single image of {width}x{height} pixels does not fit into the memory in training. "
            "Give smaller --train-sizes and --max-size, or --checkpoint-activations.",
        )
        self.parts *= 2

    def _begin_again(self, before: ForwardState) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        before.restore()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

    def _any_rank(self, here: bool) -> bool:
        return bool(self.world.sum(torch.tensor(float(here), device=self.runtime.device)) > 0)

    def share_buffers(self) -> None:
        """Gives every rank the main one's batch norm statistics: each has gathered those of its own batches."""
        if self.world.size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def _window(self, batches: list[Batch]) -> tuple[list[StepInput], Tensor]:
        inputs = [self._input(part) for batch in batches for part in batch.split(self.parts)]
        return inputs, self._normalizers(inputs)

    def _input(self, batch: Batch) -> StepInput:
        config, pixels = self.model.config, self.model.implementation.pixels
        runtime = self.runtime
        with stage("copy"):
            batch = batch.to(runtime.device)
        with stage("pixels"):
            images, mask = model_input(
                batch, config.image_mean, config.image_std, runtime.channels_last, runtime.dtype, pixels
            )
        targets = batch.targets if self.captured is None else batch.targets.with_room()
        return StepInput(images, mask, targets.labels, targets.boxes_cxcywh, targets.count)

    def _normalizers(self, inputs: list[StepInput]) -> Tensor:
        """(2,), of all batches and ranks together, for each rank: the gradients are averaged over the ranks
        afterwards."""
        queries = self.model.config.num_queries
        with stage("loss"):
            parts = [self.criterion.normalizers(Targets(*each[2:]), queries) for each in inputs]
            window = reduce(operator.add, parts)
            return self.world.sum(torch.stack((window.boxes, window.class_weight))) / self.world.size

    def _compiled(self, model: nn.Module) -> nn.Module:
        return torch.compile(model) if self.runtime.compile else model  # type: ignore[return-value]

    def _backward(self, images: Tensor, mask: Tensor | None, targets: Targets, normalizers: Normalizers) -> Terms:
        with stage("forward"), self.runtime.autocast():
            outputs = self.forward(images, mask)
        with stage("loss"):
            terms = self.criterion(outputs, targets, normalizers)
        with stage("backward"):
            self.scaler.scale(terms["loss"]).backward()
        return {name: value.detach() for name, value in terms.items()}

    def _gradients_later(self, later: bool) -> AbstractContextManager[None]:
        """Several ranks exchange gradients once a window, with its last batch."""
        if later and isinstance(self.synchronized, DistributedDataParallel):
            return self.synchronized.no_sync()
        return nullcontext()

    @torch.no_grad()
    def _average(self) -> None:
        """Exponential moving average of the weights; buffers are copied."""
        assert self.averaged is not None
        averaged, current = list(self.averaged.parameters()), list(self.model.parameters())
        get_ema_multi_avg_fn(self.ema_decay)(averaged, current, 0)
        for mine, theirs in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            mine.copy_(theirs)
