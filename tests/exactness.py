"""How equal the detector is to facebookresearch/detr: every comparison with its bound, and the README's table of them.

    python -m tests.exactness    measures on this machine and writes the table into README.md

`golden/` holds what facebookresearch/detr computes from repeatable weights, images and targets
(`detr_profiling.reference.name_seeded_weights`), on a CPU, for two sets of weights:

conditioned: in float64, with tokens of standard deviation 1, as a trained model has them.
sharp: in float32, with tokens of standard deviation 60 (R50) to 1,400 (R101). The first encoder layer's softmax is then
one-hot, which amplifies rounding: another order of summation moves gradients by a percent. So gradients are compared
with conditioned weights, and sharp ones show what they alone can: which query is matched, and one optimizer step.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from detr_profiling.reference.criterion import reference_criterion
from detr_profiling.reference.detr import ReferenceDETR
from detr_profiling.reference.name_seeded_weights import name_seeded_state_dict, seeded_batch, seeded_targets
from torch import Tensor, nn

from detr_fast import build_criterion, build_model, load_state_dict
from detr_fast.model.backends import select_backends
from detr_fast.training.optimizer import build_optimizer

FOLDER = Path(__file__).parent / "golden"
FILES = {"conditioned": "conditioned", "sharp": "facebook_detr"}
CASES = {
    "r50": ("detr_r50", "resnet50", False),
    "r50_dc5": ("detr_r50_dc5", "resnet50", True),
    "r101": ("detr_r101", "resnet101", False),
}
"""Our preset, and the reference's backbone and dilation."""
GRADIENT_FLOOR = 1e-8
"""Absolute tolerance of a gradient's norm, as a fraction of the norm of all gradients: a gradient that is zero in
exact arithmetic (the decoder starts from zeros) is rounding noise."""

Program = Literal["default", "ref", "reference"]
Weights = Literal["conditioned", "sharp"]
Quantity = Literal["outputs", "losses", "gradients", "step"]


class Row(NamedTuple):
    """A comparison with facebookresearch/detr: a training step without dropout, the largest error over CASES."""

    program: Program
    weights: Weights
    quantity: Quantity
    allowed: float


TABLE = (
    Row("default", "conditioned", "outputs", 1e-4),
    Row("default", "conditioned", "losses", 1e-5),
    Row("default", "conditioned", "gradients", 5e-3),
    Row("ref", "conditioned", "outputs", 1e-4),
    Row("ref", "conditioned", "losses", 1e-5),
    Row("ref", "conditioned", "gradients", 5e-3),
    Row("reference", "conditioned", "outputs", 1e-4),
    Row("reference", "conditioned", "losses", 1e-5),
    Row("reference", "conditioned", "gradients", 5e-3),
    Row("ref", "sharp", "outputs", 1e-4),
    Row("ref", "sharp", "losses", 1e-5),
    Row("ref", "sharp", "step", 5e-3),
    Row("reference", "sharp", "outputs", 1e-4),
    Row("reference", "sharp", "losses", 1e-5),
    Row("reference", "sharp", "step", 5e-3),
)
RUNS = tuple(dict.fromkeys((row.program, row.weights) for row in TABLE))


class Error(NamedTuple):
    """An error, and which tensor or loss term has it."""

    size: float
    where: str


@dataclass
class Step:
    """One training step, under facebookresearch's names."""

    outputs: dict[str, Any]
    terms: dict[str, float]
    grad_norms: dict[str, float]
    without_grad: set[str]
    loss_after: float
    """The loss after clipping the gradients at 0.1 and one update by AdamW; NaN where golden/ has none."""


@cache
def golden(weights: Weights) -> dict[str, Any]:
    return json.loads((FOLDER / f"{FILES[weights]}.json").read_text())


@cache
def arrays(weights: Weights) -> Any:
    return np.load(FOLDER / f"{FILES[weights]}.npz")


def golden_array(weights: Weights, name: str) -> Tensor:
    return torch.from_numpy(arrays(weights)[name])


@contextmanager
def two_threads() -> Iterator[None]:
    """Sum in the order in which the float32 golden numbers were summed: sharp weights amplify the difference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def steps(case: str) -> dict[tuple[Program, Weights], Step]:
    """Make the training step of every run of a case; each starts from the golden weights."""
    preset, backbone, dilation = CASES[case]
    ours = build_model(preset, dropout=0.0).train()
    reference = ReferenceDETR(backbone, dilation, dropout=0.0).train()
    seeded = name_seeded_state_dict(reference.state_dict(), golden("sharp")["salt"])
    found: dict[tuple[Program, Weights], Step] = {}
    with two_threads():
        for program, weights in RUNS:
            scale = golden(weights)["cases"][case].get("token_scale", 1.0)
            state_dict = {key: value * scale if "input_proj" in key else value for key, value in seeded.items()}
            if program == "reference":
                reference.load_state_dict(state_dict)
                found[program, weights] = train_step(reference, reference_criterion, weights)
            else:
                load_state_dict(ours, state_dict)
                plain = program == "ref"
                ours.to(memory_format=torch.contiguous_format if plain else torch.channels_last)  # type: ignore[call-overload]
                select_backends(ours, kernels="ref" if plain else "auto")
                found[program, weights] = train_step(ours, build_criterion(), weights)
    return found


def train_step(model: nn.Module, criterion: Callable[..., dict[str, Tensor]], weights: Weights) -> Step:
    """Make one on the golden batch, with the update where TABLE compares the loss after it."""
    given = golden(weights)
    batch, targets = seeded_batch(given["sizes"], given["salt"]), seeded_targets(given["counts"], salt=given["salt"])
    model.zero_grad()
    outputs = model(*batch)
    terms = criterion(outputs, targets)
    terms["loss"].backward()
    parameters = {facebook_name(key): parameter for key, parameter in model.named_parameters()}
    norms = {key: parameter.grad.norm().item() for key, parameter in parameters.items() if parameter.grad is not None}
    loss_after = float("nan")
    if any(row.weights == weights and row.quantity == "step" for row in TABLE):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4).step()
        with torch.no_grad():
            loss_after = criterion(model(*batch), targets)["loss"].item()
    values = {key: value.item() for key, value in terms.items()}
    return Step(outputs, values, norms, parameters.keys() - norms.keys(), loss_after)


def facebook_name(key: str) -> str:
    return key if key.startswith("backbone.0.") else key.replace("backbone.", "backbone.0.body.")


def errors_of(case: str, steps: dict[tuple[Program, Weights], Step]) -> dict[Row, Error]:
    """Give the largest error of each row of TABLE in a case; NaN is larger than any."""
    measures = {"outputs": output_errors, "losses": loss_errors, "gradients": gradient_errors, "step": step_errors}
    largest = {}
    for row in TABLE:
        errors = measures[row.quantity](case, row.weights, steps[row.program, row.weights])
        largest[row] = max(errors, key=lambda error: (error.size != error.size, error.size))
    return largest


def output_errors(case: str, weights: Weights, step: Step) -> Iterator[Error]:
    """Yield the largest absolute error of logits and of boxes, of every decoder layer."""
    layers = {f"aux{index}": output for index, output in enumerate(step.outputs["aux_outputs"])}
    assert len(layers) == 5
    for layer, output in {**layers, "pred": step.outputs}.items():
        for kind in ("logits", "boxes"):
            error = (output[f"pred_{kind}"] - golden_array(weights, f"{case}/{layer}_{kind}")).abs().max()
            yield Error(error.item(), f"{layer}_{kind}")


def loss_errors(case: str, weights: Weights, step: Step) -> Iterator[Error]:
    """Yield the relative error of every loss term and of their weighted sum."""
    given = golden(weights)["cases"][case]
    for name, value in {**given["losses"], "loss": given["total"]}.items():
        if name in step.terms:
            error = abs(step.terms[name] - value)
            yield Error(error / abs(value) if value else error, name)


def gradient_errors(case: str, weights: Weights, step: Step) -> Iterator[Error]:
    """Yield the relative error of the norm of every trained parameter's gradient."""
    given = golden(weights)["cases"][case]["grad_norms"]
    floor = GRADIENT_FLOOR * sum(norm**2 for norm in given.values()) ** 0.5
    for name, norm in given.items():
        yield Error(max(0.0, abs(step.grad_norms[name] - norm) - floor) / norm, name)


def step_errors(case: str, weights: Weights, step: Step) -> Iterator[Error]:
    """Yield the relative error of the loss after one update."""
    after = golden(weights)["cases"][case]["total_after_step"]
    yield Error(abs(step.loss_after - after) / after, "loss after one update")


BEGIN, END = "<!-- exactness: begin -->", "<!-- exactness: end -->"
PROGRAMS = {
    "default": "detr_fast as it runs by default",
    "ref": "detr_fast with `--kernels ref`",
    "reference": "the plain reference, `detr_profiling/reference`",
}
ORACLES = {"conditioned": "float64, weights like trained ones", "sharp": "float32, weights that amplify rounding"}
QUANTITIES = {
    "outputs": "class scores and boxes, six layers",
    "losses": "every loss term",
    "gradients": "norm of every gradient",
    "step": "loss after an update",
}


def exactness_table(errors: dict[Row, float]) -> str:
    """Write the README's table: of each comparison the largest error, what is allowed, and the part of that used."""
    lines = ["| a training step of | against facebookresearch/detr in | " + " | ".join(QUANTITIES.values()) + " |"]
    lines.append("|---|---|" + "---:|" * len(QUANTITIES))
    for run in RUNS:
        cells: dict[str, str] = {
            row.quantity: cell(errors[row], row.allowed) for row in TABLE if (row.program, row.weights) == run
        }
        shown = [cells.get(quantity, "") for quantity in QUANTITIES]
        lines.append("| " + " | ".join((PROGRAMS[run[0]], ORACLES[run[1]], *shown)) + " |")
    return "\n".join(lines)


def cell(error: float, allowed: float) -> str:
    """Write an error with two digits, what is allowed, and how many percent of that the written error is."""
    written = f"{error:.1e}"
    return f"{short(written)} of {short(f'{allowed:.0e}')}, {100 * float(written) / allowed:.0f} %"


def short(number: str) -> str:
    """Write 1.1e-05 as 1.1e-5."""
    return "0" if float(number) == 0 else number.replace("e-0", "e-")


def main() -> None:
    """Measure, and write the table between its marks in README.md."""
    largest = [errors_of(case, steps(case)) for case in CASES]
    table = exactness_table({row: max(errors[row].size for errors in largest) for row in TABLE})
    where = f"Largest errors on a CPU with {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}:"
    readme = FOLDER.parents[1] / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{where}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
