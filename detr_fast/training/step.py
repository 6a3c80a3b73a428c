"""One optimizer step: the one place where outputs become updates, and where a captured form can take over."""

import math
import operator
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.distributed as dist
from detr_kernels import OPERATIONS, Facts
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detr_fast.config import require
from detr_fast.data.batch import Batch, Targets
from detr_fast.model.backends import hand_out
from detr_fast.model.detr import DETR
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.recording import CudaRecorder, Recorder
from detr_fast.runtime import Runtime
from detr_fast.stages import stage
from detr_fast.training.captured import CapturedStep, Terms
from detr_fast.training.criterion import Normalizers, SetCriterion
from detr_fast.training.distributed import World
from detr_fast.training.forward_state import ForwardState, live_buffers
from detr_fast.training.meter import TermSums
from detr_fast.training.step_input import OneShape, StepInput, step_input

NO_ROOM = (
    "The memory ran out in a captured step, beside the CUDA graphs. Run without capture or with a smaller "
    "--batch-size; --resume auto goes on from the last checkpoint."
)


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
    """Micro-batches that each batch is computed in, one after another, to fit into the memory; the step is the same,
    but for live batch norm."""

    def __post_init__(self) -> None:
        self.captured: CapturedStep | None = None
        self.names: tuple[str, ...] = ()
        self.shape: OneShape | None = None
        self.sums = TermSums()
        self.shortage = ""
        """What said last that the memory ran out."""
        hand_out(self.model.selection, self.criterion)
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
        the step's beginning; UserError where single images do not fit. A captured step first gives its graphs up: it
        and all later ones run uncaptured. Not so with several processes, as the others would wait for the gradients of
        one that begins again: then it is an error.
        """
        if self.captured is not None:
            terms = self._captured_gradients(self.captured, batches)
            if terms is not None:
                return terms | self.captured.update()
            self._give_graphs_up()
        with stage("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        return self._gradients_that_fit(batches) | self.update()

    def capture(self, recorder: Recorder | None = None) -> None:
        """From now on steps are captured and replayed as CUDA graphs, one for each shape; the numbers stay the same.
        `fit` comes afterwards: it captures the largest shape first, whose memory all others then use again.

        `recorder`: what captures them; default: CUDA graphs, for which `why_not_captured` must be None.
        """
        device = self.runtime.device
        if self.world.size > 1:  # DistributedDataParallel would exchange gradients within the backward pass
            self.synchronized = self.model
            self.forward = self._compiled(self.model)
        for group in self.optimizer.param_groups:
            # read where it lies at each replay
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group["capturable"] = device.type == "cuda"
        if recorder is None:
            recorder = CudaRecorder(device, benchmark=True)
            self.runtime.reasons["cuDNN"] = "measures each shape's algorithms before it is captured (cudnn.benchmark)"
        self.shape = OneShape()
        self.captured = CapturedStep(self.micro_batch, self.update, self.trained, self.world, recorder)

    def why_not_captured(self) -> str | None:
        """Why its steps cannot be CUDA graphs; None where they can."""
        device = self.runtime.device
        if device.type != "cuda":
            return f"CUDA graphs do not run on {device.type}"
        asked = self.criterion.selection.backend("assignment", training=True)
        if OPERATIONS["assignment"].choose(Facts(device), asked).backend == "scipy":
            return "SciPy's assignment works on the host: --kernels auto"
        if self.model.transformer.checkpoint_activations:
            return "--checkpoint-activations puts dropout's random state back, which a replay would not do"
        return None

    def gradients(self, inputs: list[StepInput], normalizers: Tensor) -> Terms:
        """Adds a step's gradients, its micro-batches' on the device, to what `.grad` holds; returns their terms, and
        adds them to `sums`. Nothing here or in `update` is read on the host or comes from it."""
        parts = []
        for index, given in enumerate(inputs):
            with self._gradients_later(index < len(inputs) - 1):
                parts.append(self.micro_batch(given, normalizers))
        return self._joined(parts)

    def micro_batch(self, given: StepInput, normalizers: Tensor) -> Terms:
        """Adds one micro-batch's gradients to what `.grad` holds; returns its `losses` (N,) and `errors` (M,), whose
        names are in `names` from then on."""
        images, mask, *targets = given
        terms = self._backward(images, mask, Targets(*targets), Normalizers(*normalizers.unbind()))
        with stage("loss"):
            errors = [name for name in terms if "error" in name]
            losses = [name for name in terms if "error" not in name]
            self.names = (*losses, *errors)
            return {
                "losses": torch.stack([terms[name].float() for name in losses]),
                "errors": torch.stack([terms[name].float() for name in errors]),
            }

    def _joined(self, parts: list[Terms]) -> Terms:
        """Join the terms of a step's micro-batches: losses add up, as each is its share of the joined batch's, and
        errors are averaged."""
        with stage("loss"):
            losses, errors = (reduce(torch.add, [part[name] for part in parts]) for name in ("losses", "errors"))
            values = torch.cat((losses, errors / len(parts)))
            terms = dict(zip(self.names, values.unbind(), strict=True))
            self.sums.add(terms)
        return terms

    def _captured_gradients(self, captured: CapturedStep, batches: list[Batch]) -> Terms | None:
        """None, and all as before, where the memory runs out. Raises UserError where other processes wait meanwhile."""
        before: ForwardState | None = None
        try:
            inputs, normalizers = self._window(batches)
            if not captured.replays(inputs, normalizers):
                before = ForwardState(self.model, self.runtime.device)
            return self._joined(captured.gradients(inputs, normalizers))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            require(self.world.size == 1, NO_ROOM)
        if before is not None:
            before.restore()
        return None

    def _give_graphs_up(self) -> None:
        """Steps run uncaptured from now on, in the graphs' memory."""
        assert self.captured is not None
        self.captured.forget()
        self.captured, self.shape = None, None
        self.optimizer.zero_grad(set_to_none=True)
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn("The memory ran out beside the CUDA graphs: from now on steps run uncaptured.")

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
        """Doubles `parts` until `batch`, as large as any to come, fits into the memory of every rank. Nothing is
        trained.

        Where steps are captured, this shape is captured first, and it has to fit beside its graph; later batches then
        have its room for targets, and a mask if it has one, so that shapes are few. Raises UserError where single
        images do not fit.
        """
        if self.captured is not None:
            self.shape = OneShape.of(batch)
        while self._any_rank(not self._fits(batch)):
            if self.captured is not None and self.parts >= len(batch.images) and self.world.size == 1:
                self._give_graphs_up()  # an image may still fit without
                self.parts = 1
                continue
            self._halve([batch])
            if self.captured is not None:
                self.captured.forget()
        if self.runtime.device.type == "cuda":  # what is logged is to be the run's
            torch.cuda.reset_peak_memory_stats(self.runtime.device)

    def _fits(self, batch: Batch) -> bool:
        """Whether its micro-batches' gradients can be computed here, beside the optimizer's moments; buffers and random
        numbers are as before afterwards."""
        before = ForwardState(self.model, self.runtime.device)
        compute = self.micro_batch if self.captured is None else self.captured.try_out
        moments: list[Tensor] = []
        try:
            if not self.optimizer.state:
                moments += [torch.empty_like(each) for each in self.trained * 2]
            with self._gradients_later(True):
                for part in batch.split(self.parts):
                    given = step_input(part, self.model, self.runtime, self.shape)
                    compute(given, torch.ones(2, device=self.runtime.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.shortage = str(error)
            return False
        finally:
            moments.clear()
            self._begin_again(before)
        return True

    def _gradients_that_fit(self, batches: list[Batch]) -> Terms:
        with stage("forward"):
            before = ForwardState(self.model, self.runtime.device)
        while True:
            try:
                return self.gradients(*self._window(batches))
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.world.size > 1:
                    raise
                self.shortage = str(error)
            self._halve(batches)
            self._begin_again(before)  # outside of the handler, whose traceback keeps what was computed

    def _halve(self, batches: list[Batch]) -> None:
        height, width = max((batch.room for batch in batches), key=math.prod)
        require(
            self.parts < max(len(batch.images) for batch in batches),
            f"A single image of {width}x{height} pixels does not fit into the memory in training. "
            "Give smaller --train-sizes and --max-size, or --checkpoint-activations. "
            f"({self.shortage.partition('.')[0] or 'The memory ran out on another device'})",
        )
        self.parts *= 2

    def _begin_again(self, before: ForwardState) -> None:
        if self.captured is None:  # whose gradients are zeroed in place
            self.optimizer.zero_grad(set_to_none=True)
        before.restore()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

    def _any_rank(self, here: bool) -> bool:
        return bool(self.world.sum(torch.tensor(float(here), device=self.runtime.device)) > 0)

    def share_buffers(self) -> None:
        """Gives every rank the main one's batch norm statistics: each has gathered those of its own batches."""
        if self.world.size > 1:
            for buffer in live_buffers(self.model):
                dist.broadcast(buffer, 0)

    def _window(self, batches: list[Batch]) -> tuple[list[StepInput], Tensor]:
        parts = [part for batch in batches for part in batch.split(self.parts)]
        inputs = [step_input(part, self.model, self.runtime, self.shape) for part in parts]
        return inputs, self._normalizers(inputs)

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
        """Exponential moving average of the weights; batch norm's statistics are copied."""
        assert self.averaged is not None
        averaged, current = list(self.averaged.parameters()), list(self.model.parameters())
        get_ema_multi_avg_fn(self.ema_decay)(averaged, current, 0)
        if statistics := live_buffers(self.model):
            torch._foreach_copy_(live_buffers(self.averaged), statistics)
