"""Our model, the plain reference and the post-processing against the outputs of facebookresearch/detr itself.

`golden/facebook_detr.*` hold them for repeatable weights, images and targets (fp32, CPU). What is compared here runs in
DETR's own order of operations (kernels="ref"): the golden weights sharpen the first attention so much that another
order of summation moves gradients by a percent, in float64 as well. The fast path is judged in test_reference.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detr_profiling.reference.detr import ReferenceDETR, match_image, reference_criterion
from detr_profiling.reference.keyed_weights import keyed_batch, keyed_state_dict, keyed_targets
from torch import Tensor, nn

from detr_fast import build_criterion, build_model, export_state_dict, load_state_dict
from detr_fast.data.targets import Targets
from detr_fast.evaluation.postprocess import postprocess
from detr_fast.model.detr import Predictions
from detr_fast.model.implementation import Implementation
from detr_fast.runtime import select_implementation
from detr_fast.training.matcher import MatchCosts, match
from detr_fast.training.optimizer import build_optimizer

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "facebook_detr.json").read_text())
CASES = {
    "r50": ("detr_r50", "resnet50", False),
    "r50_dc5": ("detr_r50_dc5", "resnet50", True),
    "r101": ("detr_r101", "resnet101", False),
}
GRADIENT_FLOOR = 1e-8
"""Of the total norm: a gradient that is zero in exact arithmetic (the decoder starts from zeros) is rounding noise."""


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """As when the golden numbers were made: another number of threads sums in another order, which these weights
    amplify (R50-DC5's gradients by up to a percent)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@cache
def arrays() -> Any:
    return np.load(FOLDER / "facebook_detr.npz")


def golden_array(name: str) -> Tensor:
    return torch.from_numpy(arrays()[name])


@cache
def undetermined(case: str) -> float:
    """How much of a gradient's norm fp32 leaves open: the most that the golden ones differ from float64, relative.

    Another processor sums in another order, and these weights amplify it: there the plain reference misses golden
    gradients by 4e-3 itself, each by another amount.
    """
    model = reference_model(case).double()
    images, mask = keyed_batch(GOLDEN["sizes"], GOLDEN["salt"])
    targets = keyed_targets(GOLDEN["counts"], salt=GOLDEN["salt"])
    for target in targets:
        target["boxes"] = target["boxes"].double()
    reference_criterion(model(images.double(), mask), targets)["loss"].backward()
    golden = GOLDEN["cases"][case]["grad_norms"]
    exact = {key: each.grad.norm().item() for key, each in model.named_parameters() if each.grad is not None}
    floor = GRADIENT_FLOOR * sum(norm**2 for norm in exact.values()) ** 0.5
    return max(max(0.0, abs(exact[name] - golden[name]) - floor) / exact[name] for name in golden)


@dataclass
class Run:
    """What one implementation makes of a golden case: before, at and after one optimizer step."""

    implementation: str
    case: str
    outputs: dict[str, Any]
    terms: dict[str, float]
    grad_norms: dict[str, float]
    without_grad: set[str]
    indices: list[list[list[int]]]
    total_after_step: float

    @property
    def golden(self) -> dict[str, Any]:
        return GOLDEN["cases"][self.case]


def our_model(case: str) -> nn.Module:
    model = build_model(CASES[case][0])
    keyed = keyed_state_dict(export_state_dict(model, "facebook"), GOLDEN["salt"])
    load_state_dict(model, keyed)
    select_implementation(model, kernels="ref")
    return model.eval()


def reference_model(case: str) -> nn.Module:
    model = ReferenceDETR(*CASES[case][1:])
    model.load_state_dict(keyed_state_dict(model.state_dict(), GOLDEN["salt"]))
    return model.eval()


def our_indices(outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> list[list[list[int]]]:
    query_of_target, _ = match(
        Predictions(outputs["pred_logits"][None], outputs["pred_boxes"][None]),
        Targets.from_list(targets),
        MatchCosts(),
        Implementation(),
    )
    rows = [row[: len(target["labels"])] for row, target in zip(query_of_target[0], targets, strict=True)]
    return [[queries.sort().values.tolist(), queries.argsort().tolist()] for queries in rows]


def reference_indices(outputs: dict[str, Any], targets: list[dict[str, Tensor]]) -> list[list[list[int]]]:
    images = zip(outputs["pred_logits"], outputs["pred_boxes"], targets, strict=True)
    return [[side.tolist() for side in match_image(*image)] for image in images]


IMPLEMENTATIONS = {
    "detr_fast": (our_model, build_criterion(), our_indices),
    "reference": (reference_model, reference_criterion, reference_indices),
}


@pytest.fixture(scope="module", params=[(name, case) for name in IMPLEMENTATIONS for case in CASES], ids="-".join)
def run(request: pytest.FixtureRequest) -> Run:
    name, case = request.param
    make_model, criterion, indices = IMPLEMENTATIONS[name]
    model = make_model(case)
    batch, targets = keyed_batch(GOLDEN["sizes"], GOLDEN["salt"]), keyed_targets(GOLDEN["counts"], salt=GOLDEN["salt"])
    optimizer = build_optimizer(model, lr=1e-4, lr_backbone=1e-5, weight_decay=1e-4)
    outputs = model(*batch)
    terms = criterion(outputs, targets)
    terms["loss"].backward()
    parameters = {facebook_name(key): parameter for key, parameter in model.named_parameters()}
    grads = {key: parameter.grad.norm().item() for key, parameter in parameters.items() if parameter.grad is not None}
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    with torch.no_grad():
        after = criterion(model(*batch), targets)["loss"].item()
    values = {key: value.item() for key, value in terms.items()}
    matches = indices(outputs, targets)
    return Run(name, case, outputs, values, grads, parameters.keys() - grads.keys(), matches, after)


def facebook_name(key: str) -> str:
    return key if key.startswith("backbone.0.") else key.replace("backbone.", "backbone.0.body.")


def test_outputs_of_every_layer(run: Run) -> None:
    layers = {f"aux{index}": output for index, output in enumerate(run.outputs["aux_outputs"])}
    assert len(layers) == 5
    for layer, output in {**layers, "pred": run.outputs}.items():
        for kind in ("logits", "boxes"):
            expected = golden_array(f"{run.case}/{layer}_{kind}")
            torch.testing.assert_close(output[f"pred_{kind}"], expected, atol=1e-4, rtol=0)


DC5_BY_DEFAULT = pytest.param(
    "r50_dc5",
    marks=pytest.mark.xfail(strict=True, reason="3.4e-4: these weights amplify fp32 rounding; float64 is 9e-5 off"),
)


@pytest.mark.parametrize("case", ["r50", "r101", DC5_BY_DEFAULT])
def test_outputs_with_what_runs_by_default(case: str) -> None:
    """Folded and fused. The same function by test_reference.py, in float64; here, what fp32 leaves of it."""
    model = our_model(case)
    select_implementation(model)
    with torch.no_grad():
        outputs = model(*keyed_batch(GOLDEN["sizes"], GOLDEN["salt"]))
    for index, layer in enumerate([*outputs["aux_outputs"], outputs]):
        name = "pred" if index == 5 else f"aux{index}"
        for kind in ("logits", "boxes"):
            expected = golden_array(f"{case}/{name}_{kind}")
            torch.testing.assert_close(layer[f"pred_{kind}"], expected, atol=1e-4, rtol=0)


def test_every_term(run: Run) -> None:
    expected = {name: value for name, value in run.golden["losses"].items() if name in run.terms}
    assert len(expected) == {"detr_fast": 25, "reference": 18}[run.implementation]  # the reference logs nothing
    for name, value in expected.items():
        assert run.terms[name] == pytest.approx(value, rel=1e-5), name
    assert run.terms["loss"] == pytest.approx(run.golden["total"], rel=1e-5)


def test_matches(run: Run) -> None:
    assert run.indices == run.golden["indices"]


def test_gradient_of_every_trained_parameter(run: Run) -> None:
    expected = run.golden["grad_norms"]
    floor = GRADIENT_FLOOR * sum(norm**2 for norm in expected.values()) ** 0.5
    assert run.grad_norms.keys() == expected.keys()
    assert run.without_grad == set(run.golden["no_grad"])
    for name, norm in run.grad_norms.items():
        assert norm == pytest.approx(expected[name], rel=max(1e-3, 2 * undetermined(run.case)), abs=floor), name


def test_loss_after_one_optimizer_step(run: Run) -> None:
    """What a step changes is known as well as its gradients are."""
    before, after = run.golden["total"], run.golden["total_after_step"]
    allowed = max(1e-4 * after, 2 * undetermined(run.case) * abs(after - before))
    assert run.total_after_step == pytest.approx(after, rel=0, abs=allowed)
    assert run.total_after_step != pytest.approx(run.golden["total"], rel=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_post_processing(case: str) -> None:
    sizes_hw = torch.tensor([[480, 640], [448, 320]])
    logits, boxes = golden_array(f"{case}/pred_logits"), golden_array(f"{case}/pred_boxes")
    scores, labels, boxes_xyxy_px = postprocess(logits, boxes, sizes_hw)
    assert torch.equal(labels, golden_array(f"{case}/post_labels"))
    torch.testing.assert_close(scores, golden_array(f"{case}/post_scores"), atol=1e-6, rtol=0)
    torch.testing.assert_close(boxes_xyxy_px, golden_array(f"{case}/post_boxes"), atol=1e-3, rtol=0)


def test_no_object_is_never_a_detection() -> None:
    """In the golden outputs it is no query's likeliest class, so nothing above would show."""
    logits, boxes = golden_array("r50/pred_logits").clone(), golden_array("r50/pred_boxes")
    logits[..., -1] += 60
    scores, labels, _ = postprocess(logits, boxes, torch.tensor([[480, 640], [448, 320]]))
    assert torch.equal(labels, golden_array("r50/post_labels"))
    assert (scores < 1e-6).all()
