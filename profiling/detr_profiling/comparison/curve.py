"""Training curves of the plain reference and of ours: one batch, step after step, from the same weights, no dropout.

The rule: at its first two steps the loss may be off from float64's by twice what the reference is off by in the same
precision, plus an absolute tolerance; after the second step what is allowed doubles with every step, up to as much as
the loss itself.

It doubles because training amplifies rounding. When a match or a ReLU tips over is chance, and from then on two curves
of the same function part. Of 20 curves of detr_tiny that differ by rounding alone (four seeds, the reference and ours)
the furthest was off by 2e-4 at the third step in float32, 1e-3 at the sixth and 2e-2 at the twelfth: 1.7 times a step.
Those of detr_r50 at 128 pixels were no further apart. A wrong recipe shows before that: a loss weight at the first
step, a learning rate at the second.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detr_fast.console import Console
from detr_fast.data.batch import Batch, collate
from detr_fast.data.coco import CocoDataset
from detr_fast.detector import place
from detr_fast.model.detr import DETR
from detr_fast.options import OptimizerOptions, RuntimeOptions, TrainOptions
from detr_fast.runtime import choose_runtime
from detr_fast.training.batch_size import with_batches
from detr_fast.training.build import make_data, make_model, make_step
from detr_fast.training.distributed import World
from detr_fast.training.recipes import recipe_of
from detr_fast.weights import load_state_dict
from detr_profiling.baselines.build import in_float32
from detr_profiling.baselines.plain_loop import PlainBatch
from detr_profiling.comparison.closeness import FACTOR
from detr_profiling.observation import Observation, losses, on_host
from detr_profiling.reference.criterion import TERM_WEIGHTS, Scores, reference_criterion, term_of
from detr_profiling.reference.detr import ReferenceDETR
from detr_profiling.reference.weights import reference_of

Losses = list[Observation]
"""Every loss term, and `loss`, of each step."""

TOLERANCES = (1e-5, 5e-4)
"""Relative: what the order of its sums moves the first loss by, and what one ReLU that tips over does to the second."""
MOST_ALLOWED = 1.0


@dataclass(frozen=True)
class Task:
    """Names what is learned, and from what."""

    config: TrainOptions
    model: DETR
    """On the CPU, with its initial weights."""
    dataset: CocoDataset
    batch: Batch


def make_task(data: str, model: str, seed: int) -> Task:
    """Take the first validation images of `data`, unaugmented, as one batch of the recipe's size, and a new `model`.

    Raises UserError for data that cannot be read and for an unknown model.
    """
    recipe = recipe_of(model, data)
    config = recipe.but(data=data, model=model, seed=seed, dropout=0.0, backbone_weights="none")
    train_set, dataset, architecture = make_data(config)
    config = with_batches(config, architecture, "cpu", processes=1, images=len(train_set))
    batch = collate([dataset[0, index] for index in range(min(config.optimizer.batch_size, len(dataset)))])
    return Task(config, make_model(architecture, config, train_set, None, Console(quiet=True)), dataset, batch)


def train_ours(task: Task, options: RuntimeOptions, steps: int) -> Losses:
    """Train by the step that training takes, with the backends that `options` ask for."""
    runtime = choose_runtime(options)
    model = place(copy.deepcopy(task.model), runtime).train()
    step = make_step(model, task.config, runtime, World(), None)
    batch = task.batch.to(runtime.device)
    return [on_host(losses(step([batch]))) for _ in range(steps)]


def train_reference(task: Task, device: torch.device, precision: str, steps: int) -> tuple[Losses, ReferenceDETR]:
    """Train the reference in precision fp64, fp32, or bf16, which is fp32 under autocast."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    reference = reference_of(task.model).to(device, dtype).train()
    placed = PlainBatch.of(task.batch, task.model.config, dtype).to(device)
    asked = task.config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(reference, asked), weight_decay=asked.weight_decay)
    found = []
    for _ in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = reference(placed.images, placed.mask)
        outputs = outputs if precision == "fp64" else in_float32(outputs)
        terms = reference_criterion(outputs, placed.targets, task.model.config.scores)
        optimizer.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(reference.parameters(), asked.clip)
        optimizer.step()
        found.append(on_host(terms))
    return found, reference


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Make AdamW's groups, as the recipe has them."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if "backbone" not in name], "lr": options.lr},
        {"params": [parameter for name, parameter in named if "backbone" in name], "lr": options.lr_backbone},
    ]


def relative_errors(found: Losses, reference: Losses, scores: Scores = "softmax") -> list[float]:
    """Add, for each step, its terms' absolute errors, so that none is small by luck, relative to the loss."""
    weights = TERM_WEIGHTS[scores]
    return [
        sum(
            weights[term_of(name)] * (step[name].double() - exact[name].double()).abs().item()
            for name in exact
            if term_of(name) in weights
        )
        / exact["loss"].abs().item()
        for step, exact in zip(found, reference, strict=True)
    ]


def total(found: Losses) -> list[float]:
    return [step["loss"].item() for step in found]


def allowed_errors(reference_errors: Sequence[float]) -> list[float]:
    """Derive what each step's loss may be off by, relative, from what the reference is off by at the first two."""
    first, second = (FACTOR * error + tolerance for error, tolerance in zip(reference_errors, TOLERANCES, strict=False))
    later = (second * 2**step for step in range(len(reference_errors) - 1))
    return [min(allowed, MOST_ALLOWED) for allowed in (first, *later)]


class TrainingCurve:
    """Draws curves of the reference and of ours, one variant after another, and judges each."""

    def __init__(self, task: Task, device: torch.device, steps: int) -> None:
        self.task, self.device, self.steps = task, device, steps
        self.reference, _ = train_reference(task, device, "fp64", steps)
        self.losses: dict[str, list[float]] = {}
        self.allowed: dict[str, list[float]] = {}
        """Precision -> by how much of float64's loss each step's may be off."""
        self.failures: dict[str, str] = {}
        self.trained = copy.deepcopy(task.model)
        """Our model, with the weights that the reference has learned in float32."""
        load_state_dict(self.trained, self.run_reference("fp32").state_dict())

    def run_reference(self, precision: str) -> ReferenceDETR:
        found, reference = train_reference(self.task, self.device, precision, self.steps)
        self.losses["reference" if precision == "fp32" else f"reference {precision}"] = total(found)
        self.allowed[precision] = allowed_errors(relative_errors(found, self.reference, self.task.model.config.scores))
        return reference

    def add(self, name: str, options: RuntimeOptions) -> None:
        """Train ours as `options` say, whose precision is fp32 or bf16."""
        if options.precision not in self.allowed:
            self.run_reference(options.precision)
        found = total(train_ours(self.task, options, self.steps))
        self.losses[name] = found
        if failure := self.judge(found, self.allowed[options.precision]):
            self.failures[name] = failure

    def judge(self, found: Sequence[float], allowed: Sequence[float]) -> str | None:
        """Name the first step at which the loss is further from float64's than is allowed; None for a close curve."""
        for step, (loss, exact, most) in enumerate(zip(found, total(self.reference), allowed, strict=True), start=1):
            error = abs(loss - exact) / abs(exact)
            if not error <= most:  # NaN is not
                return f"loss at step {step}: NOT close, relative error {error:.3g}, allowed {most:.3g}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Give the curve's part of parity.json. `allowed`: by precision, relative, of each step's loss."""
        return {
            "steps": self.steps,
            "model": self.task.config.network.model,
            "data": self.task.config.dataset.data,
            "losses": {name: [finite(loss) for loss in found] for name, found in self.losses.items()},
            "reference": total(self.reference),
            "allowed": self.allowed,
            "close": not self.failures,
            "message": self.message(),
        }

    def message(self) -> str:
        failed = [f"{name}: {failure}" for name, failure in self.failures.items()]
        first = (f"{allowed[0]:.2g} and {allowed[1]:.2g} in {name}" for name, allowed in self.allowed.items())
        rule = f"allowed relative errors of the first two steps are {', '.join(first)}; then they double with each step"
        return "; ".join([*failed, rule])


def finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
