"""Queries that the encoder chooses, and boxes that are corrected layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.baselines.build import build_baseline
from detr_profiling.own_workload import build_workload
from detr_profiling.workload import WorkloadOptions
from torch.profiler import ProfilerActivity, profile

from detr_fast import export_state_dict, load_model
from detr_fast.config import MODELS, ModelConfig, UserError
from detr_fast.console import Console
from detr_fast.data.annotations import Category
from detr_fast.data.batch import Targets
from detr_fast.data.coco import CocoDataset
from detr_fast.data.transforms import EvaluationTransform
from detr_fast.model.detr import DETR, Predictions
from detr_fast.model.queries import PADDED_LOGIT, PRIOR, QuerySelection, corrected, token_anchors
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import choose_runtime
from detr_fast.train import main
from detr_fast.training.build import make_model, make_sets
from detr_fast.training.criterion import build_criterion
from detr_fast.training.recipes import RECIPES
from detr_fast.weights import load_for_fine_tuning
from detr_fast.weights.container import write_container
from tests.factories import PROPOSING
from tests.test_advice import photographs

CONFIG = replace(MODELS["detr_tiny"], **(PROPOSING | {"size_divisible": 8}))


def make(**changes: Any) -> DETR:
    torch.manual_seed(0)
    return DETR(replace(CONFIG, **changes)).eval()


IMAGES = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("queries", "positions", "refinement", "heads"),
    [
        each
        for each in product(("learned", "encoder"), ("learned", "boxes"), (False, True), (False, True))
        if each[:2] != ("encoder", "learned")
    ],
)
def test_every_combination_predicts_and_learns(queries: str, positions: str, refinement: bool, heads: bool) -> None:
    model = make(queries=queries, query_positions=positions, box_refinement=refinement, layer_heads=heads).train()
    found = model.predict_layers(IMAGES)
    assert found.logits.shape == (3, 2, 10, 6) and found.boxes_cxcywh.shape == (3, 2, 10, 4)
    assert (found.proposals is not None) == (queries == "encoder")
    targets = Targets.from_list([{"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.3}] * 2)
    build_criterion(6, scores="sigmoid")(found, targets)["loss"].backward()
    untrained = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert not untrained


def test_scores_begin_low_and_boxes_where_they_are() -> None:
    """So that the first steps neither push down thousands of scores nor move every box at random."""
    found = make().predict_layers(IMAGES)
    assert found.logits.sigmoid().mean().item() == pytest.approx(PRIOR, rel=0.5)
    assert found.proposals is not None
    anchors = token_anchors((8, 6), (64, 48), None, IMAGES)
    torch.testing.assert_close(found.proposals.boxes_cxcywh, anchors.expand(1, 2, -1, -1).clamp(1e-5, 1 - 1e-5))


@pytest.mark.parametrize("side_px", [6, 60, 200, 360])
def test_proposals_begin_at_the_size_of_the_objects_that_training_draws(side_px: int, tmp_path: Path) -> None:
    """Reaching objects that fill the image, from anchors of a fifth of it, would take long."""
    photographs(tmp_path / "train.json", images=10, side_px=side_px)
    config, transform = replace(CONFIG, hidden_dim=32), EvaluationTransform(128, 256)
    model = make_model(
        config,
        RECIPES["tiny"].but(groups=2),
        CocoDataset(tmp_path, tmp_path / "train.json", transform),
        None,
        Console(quiet=True),
    )
    sets = make_sets(model, RECIPES["tiny"].but(groups=2), choose_runtime(RuntimeOptions(device="cpu")))
    assert sets is not None
    outputs = model.predict_layers(torch.randn(1, 3, 128, 168), more=sets)
    assert outputs.proposals is not None and len(outputs.proposals.boxes_cxcywh) == 2
    for proposed in outputs.proposals.boxes_cxcywh:
        torch.testing.assert_close(
            proposed[0, :, 2:].median(0).values, torch.tensor([side_px / 480, side_px / 360]), rtol=0.03, atol=0
        )


def test_without_an_object_proposals_begin_at_their_anchors(tmp_path: Path) -> None:
    photographs(tmp_path / "train.json", images=10, empty=10)
    train_set = CocoDataset(tmp_path, tmp_path / "train.json", EvaluationTransform(128, 256))
    model = make_model(CONFIG, RECIPES["tiny"], train_set, None, Console(quiet=True))
    assert not model.query_selection.bbox_embed.layers[-1].bias.any()


def test_the_best_tokens_become_the_queries() -> None:
    torch.manual_seed(0)
    selection = QuerySelection(16, 3, 4)
    tokens, anchors = torch.randn(2, 9, 16), torch.rand(1, 9, 4)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    queries = selection(tokens, anchors, padding)
    proposals = queries.proposals
    assert (proposals.logits[1, 5:] == PADDED_LOGIT).all()
    for image in range(2):
        best = proposals.logits[image].amax(-1).argsort(descending=True)[:4]
        assert torch.equal(queries.boxes_cxcywh[image], proposals.boxes_cxcywh[image, best].detach())
    assert not queries.state.requires_grad and not queries.boxes_cxcywh.requires_grad
    assert proposals.logits.requires_grad


def test_an_image_of_few_tokens_has_as_many_queries() -> None:
    found = make(num_queries=40).predict_layers(torch.randn(1, 3, 32, 48))
    assert found.logits.shape == (3, 1, 24, 6)


def test_anchors_are_of_the_image_without_its_padding() -> None:
    alone = token_anchors((4, 6), (32, 48), None, IMAGES)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[:, :32, :48] = False
    padded = token_anchors((8, 8), (64, 64), mask, IMAGES).unflatten(1, (8, 8))
    torch.testing.assert_close(padded[:, :4, :6].flatten(1, 2), alone)
    centers = alone.unflatten(1, (4, 6))[0, :, :, :2]
    torch.testing.assert_close(centers[0, 0], torch.tensor([0.5 / 6, 0.5 / 4]))
    assert alone[..., 2:].unique(dim=1).tolist() == [[[pytest.approx(4 / 6), 1.0]]]


def test_a_correction_of_nothing_is_the_box() -> None:
    boxes = torch.rand(5, 4) * 0.8 + 0.1
    torch.testing.assert_close(corrected(boxes, torch.zeros(5, 4)), boxes)
    assert corrected(torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.zeros(4)).isfinite().all()


def test_each_layer_corrects_the_box_before_without_moving_it() -> None:
    """Its loss does not reach the layer before through the box."""
    model = make()
    with torch.no_grad():
        for head in model.bbox_embed:
            head.layers[-1].bias.fill_(0.5)
    found = model.predict_layers(IMAGES)
    first, second = torch.logit(found.boxes_cxcywh[0]), torch.logit(found.boxes_cxcywh[1])
    torch.testing.assert_close(second - first, torch.full_like(first, 0.5), atol=1e-3, rtol=0)
    found.boxes_cxcywh[2].sum().backward()
    before, own = (model.bbox_embed[index].layers[-1].bias.grad for index in (1, 2))
    assert not before.any() and own.any()


def test_proposals_are_judged_like_a_layer() -> None:
    model, criterion = make(), build_criterion(6, scores="sigmoid")
    targets = Targets.from_list([{"labels": torch.tensor([1]), "boxes": torch.rand(1, 4) * 0.4 + 0.3}] * 2)
    found = model.predict_layers(IMAGES)
    terms, alone = criterion(found, targets), criterion(found.proposals, targets)
    without = criterion(found._replace(proposals=None), targets)
    assert torch.equal(terms["loss"], without["loss"] + alone["loss"])
    assert torch.equal(terms["loss_bbox_enc"], alone["loss_bbox"]) and "loss_ce_enc" in terms


def test_the_mapping_goes_there_and_back() -> None:
    found = make().predict_layers(IMAGES)
    again = Predictions.from_dict(found.to_dict())
    assert all(map(torch.equal, found[:2], again[:2])) and found.proposals is not None and again.proposals is not None
    assert all(map(torch.equal, found.proposals[:2], again.proposals[:2]))


@pytest.mark.usefixtures("unrendered")
def test_a_run_is_resumed_evaluated_and_loaded(shapes_root: Path, tmp_path: Path) -> None:
    small = {
        "data": str(shapes_root),
        "output": str(tmp_path),
        "batch_size": 8,
        "device": "cpu",
        "epochs": 1,
        "ema": 0.9,
    }
    options = RECIPES["tiny"].but(**small, **PROPOSING)
    assert main(options) == 0 and main(options.but(resume="auto", epochs=2)) == 0
    best = tmp_path / "checkpoints" / "best.pt"
    detector = load_model(best)
    assert detector.config.beyond_detr.keys() >= PROPOSING.keys()
    pixels = (torch.rand(40, 64, 3) * 255).byte().numpy()
    for found in (detector.predict(pixels, threshold=0.0), load_model(best, optimize=True).predict(pixels, 0.0)):
        assert len(found[0]) == 60 and found[0].scores.isfinite().all()  # ten queries of six classes
    with pytest.raises(UserError, match=r"scores=sigmoid.* has no counterpart in facebook's DETR"):
        export_state_dict(detector, "facebook")


def saved(model: DETR, path: Path, categories: Sequence[str]) -> Path:
    """A file of `model` whose classes have these names."""
    named = [{"id": number, "name": name} for number, name in enumerate(categories, 1)]
    content = {"model": model.state_dict(), "model_config": model.config.to_dict(), "categories": named}
    write_container(path, content)
    return path


def test_other_classes_keep_the_rows_of_those_that_agree(tmp_path: Path) -> None:
    """In the heads of every layer and of the proposals, whatever their order."""
    learned, fresh = make(num_classes=3), make(num_classes=2)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(1)
    path = saved(learned, tmp_path / "a.pt", ["cat", "dog", "cow"])
    report = load_for_fine_tuning(fresh, path, [Category(5, "Cow"), Category(9, "owl")])
    assert report.classes == ["Cow"] and not report.new
    heads = [*zip(learned.class_embed, fresh.class_embed, strict=True)]
    heads.append((learned.query_selection.class_embed, fresh.query_selection.class_embed))
    untouched = make(num_classes=2)
    for number, (theirs, ours) in enumerate(heads):
        assert torch.equal(ours.weight[0], theirs.weight[2]) and torch.equal(ours.bias[0], theirs.bias[2])
        own = [*untouched.class_embed, untouched.query_selection.class_embed][number]
        assert torch.equal(ours.weight[1], own.weight[1])
    assert torch.equal(fresh.bbox_embed[0].layers[0].weight, learned.bbox_embed[0].layers[0].weight)


def test_rows_of_another_kind_of_scores_are_not_kept(tmp_path: Path) -> None:
    """Two softmax classes have as many rows as three sigmoid ones: the last would become "no object"."""
    plain: dict[str, Any] = {"queries": "learned", "query_positions": "learned", "layer_heads": False}
    learned, fresh = make(num_classes=3, **plain), make(num_classes=2, scores="softmax", **plain)
    before = fresh.class_embed.weight.clone()
    report = load_for_fine_tuning(fresh, saved(learned, tmp_path / "a.pt", ["a", "b", "c"]), [Category(1, "a")])
    assert report.new == ["class_embed"] and torch.equal(fresh.class_embed.weight, before)


def test_it_starts_from_a_detr_as_far_as_shapes_agree(tmp_path: Path) -> None:
    detr, model = DETR(MODELS["detr_tiny"]), make()
    path = saved(detr, tmp_path / "detr.pt", ["a", "b", "c", "d", "e", "f"])
    report = load_for_fine_tuning(model, path, [Category(1, "a")])
    assert {"class_embed", "bbox_embed", "query_selection", "query_position"} <= set(report.new) and not report.classes
    assert report.left_out and any("queries=learned" in note for note in report.notes)
    for part in ("backbone", "transformer", "input_proj"):
        theirs, ours = (getattr(each, part).state_dict() for each in (detr, model))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(("mode", "model"), [("training", "detr_tiny"), ("inference", "detr_r50")])
def test_the_suite_measures_it(mode: str, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "encoder_layers": 1, "decoder_layers": 1, "mode": mode, "device": "cpu"}
    asked |= {"size": "64x64", "batch_size": 2, "precision": "fp32", **PROPOSING}
    workload = build_workload(WorkloadOptions.of(**asked))
    assert workload.run() is not None and "queries" in ranges_of(workload.run)
    same = build_workload(WorkloadOptions.of(**asked)), build_baseline("reference", WorkloadOptions.of(**asked))
    found, exact = (each.observe() for each in same if each.observe)
    assert found.keys() == exact.keys() and "boxes of proposals" in found
    torch.testing.assert_close(found["boxes"], exact["boxes"], rtol=0, atol=1e-4)


def ranges_of(run: Callable[[], Any]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return {event.name for event in found.events()}


def parts(config: ModelConfig) -> set[str]:
    return {name.partition(".")[0] for name in DETR(config).state_dict()}


def test_detr_itself_has_no_part_more() -> None:
    plain = {"backbone", "input_proj", "transformer", "query_embed", "class_embed", "bbox_embed"}
    assert parts(MODELS["detr_tiny"]) == plain
    assert parts(CONFIG) == plain - {"query_embed"} | {"query_selection", "query_position", "input_norm"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": "softmax"}, 'queries "encoder" need scores "sigmoid"'),
        ({"query_positions": "learned"}, 'queries "encoder" need'),
        ({"token_stride": 16, "dilation": True}, "both set the stride"),
        ({"feature_strides": (32,)}, "join maps at token_stride: give that"),
        ({"token_stride": 16, "feature_strides": (24,)}, "multiples or divisors"),
        ({"token_stride": 16, "feature_strides": (0,)}, "multiples or divisors"),
        ({"position_temperature": 1.0}, "position_temperature must be above 1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(("changes", "step"), [({"size_divisible": 12}, 8), ({"backbone": "resnet50"}, 32)])
def test_tokens_that_propose_are_whole(changes: dict[str, Any], step: int) -> None:
    """Anchors of an image with half a token at its end would lie elsewhere with a mask than without."""
    with pytest.raises(UserError, match=f"{step} pixels wide: give --size-divisible {step}"):
        make(**changes)
