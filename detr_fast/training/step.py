"""One optimizer step: the one place where outputs become updates, and where a captured form can take over."""

import operator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detr_fast.data.batching import Batch, model_input
from detr_fast.model.detr import DETR
from detr_fast.runtime import Runtime
from detr_fast.stages import stage
from detr_fast.training.criterion import Normalizers, SetCriterion
from detr_fast.training.distributed import World


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

    def __post_init__(self) -> None:
        self.model.implementation.apply_to(self.criterion)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.forward: nn.Module = self.model
        if self.world.size > 1:
            devices = [self.world.local_rank] if self.runtime.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        self.synchronized = self.forward
        if self.runtime.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]

    def __call__(self, batches: list[Batch]) -> dict[str, Tensor]:
        """The step's terms as device scalars, of all its batches on this rank, and `grad_norm` before clipping."""
        with stage("copy"):
            batches = [batch.to(self.runtime.device) for batch in batches]
        with stage("loss"):
            normalizers = self._normalizers(batches)
        with stage("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            with self._gradients_later(index < len(batches) - 1):
                part = self._backward(batch, normalizers)
            for name, value in part.items():
                share = value / len(batches) if "error" in name else value  # losses are shares of the joined batch's
                terms[name] = terms[name] + share if name in terms else share
        with stage("optimizer"):
            self.scaler.unscale_(self.optimizer)
            clip = self.clip or float("inf")
            terms["grad_norm"] = nn.utils.clip_grad_norm_(self.trained, clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.averaged is not None:
                self._average()
        return terms

    def share_buffers(self) -> None:
        """Gives every rank the main one's batch norm statistics: each has gathered those of its own batches."""
        if self.world.size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def _normalizers(self, batches: list[Batch]) -> Normalizers:
        """Of all batches and ranks together, for each rank: the gradients are averaged over the ranks afterwards."""
        queries = self.model.config.num_queries
        parts = [self.criterion.normalizers(batch.targets, queries) for batch in batches]
        window = reduce(operator.add, parts)
        summed = self.world.sum(torch.stack((window.boxes, window.class_weight))) / self.world.size
        return Normalizers(*summed.unbind())

    def _backward(self, batch: Batch, normalizers: Normalizers) -> dict[str, Tensor]:
        config, pixels = self.model.config, self.model.implementation.pixels
        runtime = self.runtime
        with stage("pixels"):
            images, mask = model_input(
                batch, config.image_mean, config.image_std, runtime.channels_last, runtime.dtype, pixels
            )
        with stage("forward"), runtime.autocast():
            outputs = self.forward(images, mask)
        with stage("loss"):
            terms = self.criterion(outputs, batch.targets, normalizers)
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
