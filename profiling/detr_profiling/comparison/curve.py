"""A training curve: the same batch over and over from the same weights without dropout, by the plain reference and by
ours.

Training amplifies rounding: when a match or a ReLU tips over is chance, and from then on two curves part, up to tenfold
a step. How far is measured, not picked: the reference is trained in float64, in the precision of each variant, and in
that precision from weights that are off by its rounding. Since the curves that part first do so some steps before the
others, from the third step on what these have parted by at twice as many steps counts.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from detr_fast.config import RuntimeOptions, TrainConfig
from detr_fast.console import Console
from detr_fast.data.batching import Batch, collate
from detr_fast.data.coco import CocoDataset
from detr_fast.detector import place
from detr_fast.model.detr import DETR
from detr_fast.runtime import choose_runtime
from detr_fast.training.assembly import make_data, make_model, make_step
from detr_fast.training.batch_size import with_batches
from detr_fast.training.distributed import World
from detr_fast.training.recipes import recipe_of
from detr_fast.weights import load_state_dict
from detr_profiling.comparison.closeness import FACTOR, closeness
from detr_profiling.observation import Observation, losses, on_host
from detr_profiling.peers.build import in_float32
from detr_profiling.peers.plain_loop import PlainBatch
from detr_profiling.reference.detr import TERM_WEIGHTS, ReferenceDETR, reference_criterion
from detr_profiling.reference.weights import SCATTER_SEEDS, reference_of, scattered

Losses = list[Observation]
"""Every loss term, and `loss`, of each step."""

FIRST_FLOOR, LATER_FLOOR = 1e-5, 2e-4
"""Of the loss: what the order of its sums moves it by before the first step; and later what one ReLU that tips over
does, at steps where it does so in none of the reference's curves."""
PARTED_STEPS = 16
"""The references of a shorter curve go on, up to as many steps, since what they part by at twice its steps counts."""


@dataclass(frozen=True)
class Task:
    """What is learned, and from what."""

    config: TrainConfig
    model: DETR
    """On the CPU, with its initial weights."""
    dataset: CocoDataset
    batch: Batch


def make_task(data: str, model: str, seed: int) -> Task:
    """The first validation images of `data`, unaugmented, as one batch of the recipe's size, and a new `model`.

    Raises UserError for data that cannot be read and for an unknown model.
    """
    recipe = recipe_of(model, data)
    config = replace(recipe, data=data, model=model, seed=seed, dropout=0.0, backbone_weights="none")
    train_set, dataset, architecture = make_data(config)
    config = with_batches(config, architecture, "cpu", processes=1, images=len(train_set))
    batch = collate([dataset[0, index] for index in range(min(config.batch_size, len(dataset)))])
    return Task(config, make_model(architecture, config, train_set, None, Console(quiet=True)), dataset, batch)


def train_ours(task: Task, options: RuntimeOptions, steps: int) -> Losses:
    """By the step that training takes, in the form that `options` ask for."""
    config = replace(task.config, **{each.name: getattr(options, each.name) for each in fields(RuntimeOptions)})
    runtime = choose_runtime(config)
    model = place(copy.deepcopy(task.model), runtime).train()
    step = make_step(model, config, runtime, World(), None)
    batch = task.batch.to(runtime.device)
    return [on_host(losses(step([batch]))) for _ in range(steps)]


def train_reference(
    task: Task, device: torch.device, precision: str, steps: int, scatter_seed: int | None = None
) -> tuple[Losses, ReferenceDETR]:
    """Precision fp64, fp32, or bf16, which is fp32 under autocast. With a `scatter_seed` each initial weight is off by
    what rounding to that precision may do."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    reference = scattered(reference_of(task.model), precision, scatter_seed).to(device, dtype).train()
    placed = PlainBatch.of(task.batch, task.model.config, dtype).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(reference, task.config), weight_decay=task.config.weight_decay)
    found = []
    for _ in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = reference(placed.images, placed.mask)
        terms = reference_criterion(outputs if precision == "fp64" else in_float32(outputs), placed.targets)
        optimizer.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(reference.parameters(), task.config.clip)
        optimizer.step()
        found.append(on_host(terms))
    return found, reference


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's, as the recipe has them."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if "backbone" not in name], "lr": config.lr},
        {"params": [parameter for name, parameter in named if "backbone" in name], "lr": config.lr_backbone},
    ]


def relative_errors(found: Losses, oracle: Losses) -> list[float]:
    """Of each step's loss: its terms' errors added without their signs, so that none is small by luck."""
    return [
        sum(
            TERM_WEIGHTS[term] * (step[name].double() - exact[name].double()).abs().item()
            for name in exact
            if (term := name.rstrip("_0123456789")) in TERM_WEIGHTS
        )
        / exact["loss"].abs().item()
        for step, exact in zip(found, oracle, strict=True)
    ]


def total(found: Losses) -> list[float]:
    return [step["loss"].item() for step in found]


class TrainingCurve:
    """Curves of the reference and of ours, one variant after another, and the verdict on each."""

    def __init__(self, task: Task, device: torch.device, steps: int) -> None:
        self.task, self.device, self.steps = task, device, steps
        self.horizon = max(steps, min(2 * steps, PARTED_STEPS))
        exact, _ = train_reference(task, device, "fp64", self.horizon)
        self.beyond, self.oracle = exact, exact[:steps]
        self.losses: dict[str, list[float]] = {}
        self.parted: dict[str, list[float]] = {}
        """Precision -> at each step how far the reference's loss may be taken to part from float64's, relative."""
        self.failures: dict[str, str] = {}
        self.trained = copy.deepcopy(task.model)
        """With what the reference has learned in float32."""
        reference = self.run_references("fp32")
        load_state_dict(self.trained, reference.state_dict())

    def run_references(self, precision: str) -> ReferenceDETR:
        plain, reference = train_reference(self.task, self.device, precision, self.horizon)
        others = [train_reference(self.task, self.device, precision, self.horizon, seed)[0] for seed in SCATTER_SEEDS]
        self.losses["reference" if precision == "fp32" else f"reference {precision}"] = total(plain[: self.steps])
        errors = zip(*(relative_errors(run, self.beyond) for run in (plain, *others)), strict=True)
        by_then = list(itertools.accumulate(map(max, errors), max))
        later = [by_then[min(2 * step, self.horizon - 1)] for step in range(2, self.steps)]
        self.parted[precision] = by_then[:2] + later
        return reference

    def add(self, name: str, options: RuntimeOptions) -> None:
        """Trains ours as `options` say, whose precision is fp32 or bf16."""
        if options.precision not in self.parted:
            self.run_references(options.precision)
        found = total(train_ours(self.task, options, self.steps))
        self.losses[name] = found
        if failure := self.judge(found, self.parted[options.precision]):
            self.failures[name] = failure

    def judge(self, found: Sequence[float], parted: Sequence[float]) -> str | None:
        """The first step at which the loss is further from float64's than closeness allows; None for a close curve."""
        for step, (loss, exact, share) in enumerate(zip(found, total(self.oracle), parted, strict=True), start=1):
            ours, oracle, eager = torch.tensor([loss, exact, exact * (1 + share)], dtype=torch.float64)
            judged = closeness(ours, oracle, eager, loss_floor(step) * abs(exact), f"loss at step {step}")
            if not judged:
                return judged.message
        return None

    def to_dict(self) -> dict[str, Any]:
        """The curve's part of parity.json. `allowed`: by precision, how far each step's loss may be from float64's."""
        allowed = {
            name: [FACTOR * share + loss_floor(step) for step, share in enumerate(parted, start=1)]
            for name, parted in self.parted.items()
        }
        return {
            "steps": self.steps,
            "model": self.task.config.model,
            "data": self.task.config.data,
            "losses": {name: [finite(loss) for loss in found] for name, found in self.losses.items()},
            "oracle": total(self.oracle),
            "allowed": allowed,
            "close": not self.failures,
            "message": self.message(),
        }

    def message(self) -> str:
        failed = [f"{name}: {failure}" for name, failure in self.failures.items()]
        moved = [f"{parted[-1]:.2g} in {name}" for name, parted in self.parted.items()]
        basis = (
            f"rounding alone moves the reference's loss by up to {', '.join(moved)} (relative) in {self.steps} steps"
        )
        return "; ".join([*failed, basis])


def loss_floor(step: int) -> float:
    """Of the loss that step number `step`, from 1, begins with; relative."""
    return FIRST_FLOOR if step == 1 else LATER_FLOOR


def finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
