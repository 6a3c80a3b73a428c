"""Ours and the plain reference against facebookresearch/detr itself: each row of TABLE in tests/exactness.py."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from detr_kernels import batched_assignment, match_cost
from detr_profiling.reference.criterion import match_image
from detr_profiling.reference.name_seeded_weights import seeded_targets
from torch import Tensor

from detr_fast.data.batch import Targets
from detr_fast.postprocess import postprocess
from tests.exactness import (
    BEGIN,
    CASES,
    END,
    TABLE,
    Error,
    Program,
    Row,
    Step,
    Weights,
    errors_of,
    exactness_table,
    golden,
    golden_array,
    steps,
)


@dataclass
class Found:
    """What the programs made of one case."""

    case: str
    steps: dict[tuple[Program, Weights], Step]
    errors: dict[Row, Error]


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest) -> Iterator[Found]:
    made = steps(request.param)
    yield Found(request.param, made, errors_of(request.param, made))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(row[:3]))
def test_within_what_is_allowed(found: Found, row: Row) -> None:
    assert found.errors[row].size <= row.allowed, found.errors[row]


def test_the_same_terms_and_trained_parameters(found: Found) -> None:
    for (program, weights), step in found.steps.items():
        given, upstream = golden(weights)["cases"][found.case], golden("sharp")["cases"][found.case]
        compared = given["losses"].keys() & step.terms.keys()
        assert len(compared) == (18 if program == "reference" else 25)  # the reference computes what is learned from
        assert step.grad_norms.keys() == given["grad_norms"].keys()
        assert step.without_grad == set(upstream["no_grad"])


def test_the_same_queries_are_matched(found: Found) -> None:
    given = golden("sharp")
    targets = seeded_targets(given["counts"], salt=given["salt"])
    ours, reference = (found.steps[program, "sharp"].outputs for program in ("ref", "reference"))
    assert matched_by_ours(ours, targets) == given["cases"][found.case]["indices"]
    images = zip(reference["pred_logits"], reference["pred_boxes"], targets, strict=True)
    matched = [[side.tolist() for side in match_image(*image)] for image in images]
    assert matched == given["cases"][found.case]["indices"]


def matched_by_ours(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[list[list[int]]]:
    """Give for each image the matched queries in ascending order, and their targets."""
    joined = Targets.from_list(targets)
    logits, boxes_cxcywh = outputs["pred_logits"][None], outputs["pred_boxes"][None]
    cost = match_cost(logits.detach(), boxes_cxcywh.detach(), joined.labels, joined.boxes_cxcywh)
    query_of_target = batched_assignment(cost, joined.count)
    rows = [row[: len(target["labels"])] for row, target in zip(query_of_target, targets, strict=True)]
    return [[queries.sort().values.tolist(), queries.argsort().tolist()] for queries in rows]


def test_an_update_changes_the_loss(found: Found) -> None:
    """Else the loss after one would say nothing."""
    given = golden("sharp")["cases"][found.case]
    assert given["total_after_step"] < 0.8 * given["total"]


@pytest.mark.parametrize("case", CASES)
def test_post_processing(case: str) -> None:
    sizes_hw = torch.tensor([[480, 640], [448, 320]])
    logits, boxes = golden_array("sharp", f"{case}/pred_logits"), golden_array("sharp", f"{case}/pred_boxes")
    scores, labels, boxes_xyxy_px = postprocess(logits, boxes, sizes_hw)
    assert torch.equal(labels, golden_array("sharp", f"{case}/post_labels"))
    torch.testing.assert_close(scores, golden_array("sharp", f"{case}/post_scores"), atol=1e-6, rtol=0)
    torch.testing.assert_close(boxes_xyxy_px, golden_array("sharp", f"{case}/post_boxes"), atol=1e-3, rtol=0)


def test_no_object_is_never_a_detection() -> None:
    """In the golden outputs it is no query's likeliest class, so nothing above would show."""
    logits, boxes = golden_array("sharp", "r50/pred_logits").clone(), golden_array("sharp", "r50/pred_boxes")
    logits[..., -1] += 60
    scores, labels, _ = postprocess(logits, boxes, torch.tensor([[480, 640], [448, 320]]))
    assert torch.equal(labels, golden_array("sharp", "r50/post_labels"))
    assert (scores < 1e-6).all()


def test_the_readme_has_every_row_with_its_bound_and_percentage() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0].partition("\n\n")[2].rstrip("\n")
    written = [float(number) for number in re.findall(r"(\S+) of \S+, \d+ %", shown)]
    errors = dict(zip(TABLE, written, strict=True))
    assert shown == exactness_table(errors)
    assert all(math.isfinite(error) and error <= row.allowed for row, error in errors.items())
