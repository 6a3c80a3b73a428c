"""One optimizer step, eagerly: inputs, forward, loss, backward, clip, AdamW, EMA model.

Around it, with the same call: `micro_batches`, for batches that do not fit into the memory, and `graphed_step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce

import torch
from torch import Tensor, nn

from detr_fast.data.batch import Batch, Targets
from detr_fast.model.backends import hand_out
from detr_fast.model.detr import DETR, Predictions
from detr_fast.model.query_sets import NoisedTargets, QuerySets
from detr_fast.preprocessing import Preprocessing
from detr_fast.profiler_ranges import profiler_range
from detr_fast.runtime import Runtime
from detr_fast.training.criterion import Normalizers, SetCriterion
from detr_fast.training.denoising import noised_targets
from detr_fast.training.distributed import World, all_reduce_later, data_parallel
from detr_fast.training.meter import TermSums
from detr_fast.training.snapshot import batch_norm_statistics
from detr_fast.training.step_input import StepInput, step_input

Terms = dict[str, Tensor]
"""Name -> values on the device."""
KINDS = ("losses", "errors")


class LayerwiseNetwork(nn.Module):
    """Makes `predict_layers`, of further sets of queries too, a forward pass: for DistributedDataParallel and
    torch.compile to wrap, and with all parameters that are trained."""

    def __init__(self, network: DETR, sets: QuerySets | None = None) -> None:
        super().__init__()
        self.network = network
        self.sets = sets

    def forward(self, images: Tensor, mask: Tensor | None, noised: NoisedTargets | None = None) -> Predictions:
        more = None if self.sets is None else partial(self.sets, noised=noised)
        return self.network.predict_layers(images, mask, more)


@dataclass
class TrainStep:
    """Makes an optimizer step: forward, loss and backward of several batches, then clip, AdamW and the EMA model.

    The batches, on the device, and all ranks have one set of normalizers, so the step is that of their joined batch,
    except for live batch norm, whose statistics are each batch's own. Nothing waits for the device, unless SciPy's
    assignment is asked for on a GPU.
    """

    model: DETR
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    runtime: Runtime
    world: World = field(default_factory=World)
    clip: float = 0.1
    ema: DETR | None = None
    ema_decay: float = 0.0
    """At most; see `warm_ema_up`."""
    sets: QuerySets | None = None
    """Further sets of queries, which are trained with the model and are no part of it."""

    def __post_init__(self) -> None:
        self.ema_rate = torch.full((), 1 - self.ema_decay, device=self.runtime.device)
        hand_out(self.model.selection, self.criterion)
        self.preprocessing = Preprocessing.of(self.model, self.runtime)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.runtime.dtype == torch.float16)
        self.network = LayerwiseNetwork(self.model, self.sets)
        self.trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.names: tuple[str, ...] = ()
        self.sums = TermSums()
        self.average_gradients_over(self.world)

    def average_gradients_over(self, world: World) -> None:
        """Let the backward pass average gradients over the processes of `world`; over one, leave them as they are."""
        self.synchronized = data_parallel(self.network, world, self.runtime.device)
        self.forward = torch.compile(self.synchronized) if self.runtime.compile else self.synchronized

    def __call__(self, batches: Sequence[Batch]) -> Terms:
        """Make one step; returns the terms of its batches on this rank, and `grad_norm` before clipping."""
        return self.gradients(batches) | self.update()

    def gradients(self, batches: Sequence[Batch]) -> Terms:
        """Compute a step's gradients into `.grad`, and add its terms to `sums`."""
        with profiler_range("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        inputs = [step_input(batch, self.preprocessing) for batch in batches]
        normalizers, terms = self.normalizers(inputs), []
        for number, given in enumerate(inputs, 1):
            with all_reduce_later(self.synchronized, number < len(inputs)):  # once a step, with its last batch
                terms.append(self.micro_batch(given, normalizers))
        return self.joined(terms)

    def micro_batch(self, given: StepInput, normalizers: Tensor) -> Terms:
        """Add one micro-batch's gradients to `.grad`, without reading or copying anything between host and device.

        Returns its `losses` (N,) and `errors` (M,), whose names are in `names` from then on.
        """
        with profiler_range("forward"), self.runtime.autocast():
            predictions = self.forward(given.images, given.mask, self.noise(given.targets))
        with profiler_range("loss"):
            terms = self.criterion(predictions, given.targets, Normalizers(*normalizers.unbind()))
        with profiler_range("backward"):
            self.scaler.scale(terms["loss"]).backward()
        with profiler_range("loss"):
            errors = [name for name in terms if "error" in name]
            losses = [name for name in terms if "error" not in name]
            self.names = (*losses, *errors)
            stacked = (torch.stack([terms[name].detach().float() for name in names]) for names in (losses, errors))
            return dict(zip(KINDS, stacked, strict=True))

    def noise(self, targets: Targets) -> NoisedTargets | None:
        """Draw the queries of the denoising sets, of one shape whatever the targets; None where there are no such sets.

        They are drawn on the device as dropout is: anew in each replay of a graph, and repeated by a resumed run.
        """
        if self.sets is None or not self.sets.denoising:
            return None
        return noised_targets(targets, self.sets.denoising, self.model.config)

    def update(self) -> Terms:
        """Clip, and step the optimizer and the EMA model, by the gradients that lie in `.grad`.

        The scale of fp16's loss stays on the device as well: fused AdamW is told there whether to skip.
        """
        with profiler_range("optimizer"):
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
            if self.ema is not None:
                update_ema(self.ema, self.model, self.ema_rate)
            terms = {"grad_norm": norm, "skipped": skipped}
            self.sums.add(terms)
        return terms

    def warm_ema_up(self, step: int) -> None:
        """Set how far the EMA model moves in step number `step`: the first ones far, so that it forgets the start."""
        self.ema_rate.fill_(1 - min(self.ema_decay, (1 + step) / (10 + step)))

    def normalizers(self, inputs: Sequence[StepInput]) -> Tensor:
        """Sum normalizers (2,) over all inputs and ranks; divide by the ranks, as gradients are averaged."""
        queries = self.model.config.num_queries
        with profiler_range("loss"):
            first, *others = (self.criterion.normalizers(given.targets, queries) for given in inputs)
            joined = sum(others, first)
            return self.world.sum(torch.stack((joined.boxes, joined.class_weight))) / self.world.size

    def joined(self, of_micro_batches: Sequence[Terms]) -> Terms:
        """Join the terms of micro-batches: add the losses, which have joint normalizers; average the errors."""
        with profiler_range("loss"):
            losses, errors = (reduce(torch.add, [each[kind] for each in of_micro_batches]) for kind in KINDS)
            values = torch.cat((losses, errors / len(of_micro_batches)))
            terms = dict(zip(self.names, values.unbind(), strict=True))
            self.sums.add(terms)
        return terms


@torch.no_grad()
def update_ema(ema: DETR, model: DETR, rate: Tensor) -> None:
    """Move `ema` towards `model` by `rate`, on the device, of the way; batch norm's statistics all of it."""
    averages: list[Tensor] = list(ema.parameters())
    weights: list[Tensor] = list(model.parameters())
    way = list(torch._foreach_sub(weights, averages))
    torch._foreach_mul_(way, rate)
    torch._foreach_add_(averages, way)
    if statistics := batch_norm_statistics(model):
        torch._foreach_copy_(batch_norm_statistics(ema), statistics)
