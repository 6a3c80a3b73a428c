"""Groups of queries and denoising sets: what they cost the network's own set (nothing), and what their loss is."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_kernels import match_cost
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou

from detr_fast import export_state_dict, load_model
from detr_fast.boxes import cxcywh_to_xyxy, iou
from detr_fast.config import ModelConfig
from detr_fast.data.batch import Batch, Targets, collate
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR, Predictions
from detr_fast.model.query_sets import NoisedTargets, QuerySets
from detr_fast.options import Attention
from detr_fast.train import main
from detr_fast.training import matcher
from detr_fast.training.criterion import LossWeights, build_criterion
from detr_fast.training.denoising import noised_targets, own_queries
from detr_fast.training.distributed import World
from detr_fast.training.graphed_step import GraphedStep
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.step import LayerwiseNetwork
from detr_fast.weights.container import read_container
from tests.factories import NARROW, TINY, begun, make_batch, make_sample, make_step, run_processes
from tests.stand_in import StandIn
from tests.test_queries import PROPOSING

CONFIGS = {
    "detr": TINY,
    "learned boxes": replace(TINY, query_positions="boxes", box_refinement=True),
    "learned positions": replace(TINY, box_refinement=True, scores="sigmoid"),
    "encoder": replace(TINY, **PROPOSING),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IMAGES = torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(3, 64, 48, dtype=torch.bool)
MASK[1, :, 40:] = True


def targets_of(*counts: int, classes: int = 6) -> Targets:
    """Targets of so many objects an image, none near an edge."""
    generator = torch.Generator().manual_seed(2)
    return Targets.from_list(
        [
            {
                "labels": torch.randint(classes, (count,), generator=generator),
                "boxes": (torch.rand(count, 4, generator=generator) * 0.2 + 0.4) * torch.tensor([1, 1, 0.5, 0.5]),
            }
            for count in counts
        ]
    )


def make(config: ModelConfig, groups: int = 1, denoising: int = 0) -> tuple[LayerwiseNetwork, QuerySets]:
    """A network with its further sets, in evaluation mode, where no image's batch norm depends on another.

    Nothing that begins as zeros is zero.
    """
    torch.manual_seed(0)
    sets = QuerySets(config, groups, denoising)
    made = LayerwiseNetwork(DETR(config), sets).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter) * (not parameter.any())
    return made, sets


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is rounded to float32 but the costs of matching: what the network always gives in float32 neither."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(
        matcher, "match_cost", lambda *given, **by_name: match_cost(*given, **by_name).to(torch.float32)
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def gradient_of(network: DETR, name: str) -> Tensor:
    gradient = network.get_parameter(name).grad
    assert gradient is not None
    return gradient


@each_config
@pytest.mark.usefixtures("double")
def test_the_loss_of_groups_is_the_mean_of_their_own(config: ModelConfig) -> None:
    """Each group's is the loss of a network that has its queries; gradients too, in float64."""
    targets, criterion = targets_of(3, 0, 12), build_criterion(6, scores=config.scores)
    criterion_of = lambda found: criterion(found, targets)  # noqa: E731
    together, sets = make(config, groups=3)
    terms = criterion_of(together(IMAGES.double(), MASK))
    terms["loss"].backward()
    singles = []
    for group in (None, *sets.groups):
        single = copy.deepcopy(together.network)
        single.zero_grad()
        single.load_state_dict(single.state_dict() | (group.state_dict() if group else {}))
        singles.append((single, criterion_of(single.predict_layers(IMAGES.double(), MASK))))
        singles[-1][1]["loss"].backward()
    first, mean = singles[0][1], sum(each["loss"] for _, each in singles) / 3
    torch.testing.assert_close(terms["loss"], mean, rtol=1e-12, atol=0)
    assert len({round(each["loss"].item(), 6) for _, each in singles}) == 3
    for name in first.keys() - {"loss", "nonfinite_costs"}:
        torch.testing.assert_close(terms[name], first[name], rtol=1e-12, atol=1e-12)
    own = sets.groups[0].state_dict().keys()
    for name, parameter in together.network.named_parameters():
        if parameter.requires_grad:
            gradients = [gradient_of(single, name) / 3 for single, _ in singles]
            expected = gradients[0] if name in own else sum(gradients, torch.zeros(()))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    for group, (single, _) in zip(sets.groups, singles[1:], strict=True):
        for name, parameter in group.named_parameters():
            expected = gradient_of(single, name) / 3
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)


def noise_of(targets: Targets, config: ModelConfig, sets: int, seed: int = 0) -> NoisedTargets:
    torch.manual_seed(seed)
    return noised_targets(targets, sets, config)


@each_config
@pytest.mark.usefixtures("double")
def test_no_set_sees_another(config: ModelConfig) -> None:
    """Each gives what it gives alone, and the same to the bit whatever the others start from."""
    network, sets = make(config, groups=2, denoising=2)
    layers = config.decoder_layers
    noise = [noise_of(targets_of(3, 0, 12), config, 2, seed) for seed in (0, 1)]
    found = network(IMAGES.double(), MASK, noise[0])
    assert found.logits.shape[:3] == (4 * layers, 3, config.num_queries) and found.groups == found.denoising == 2
    alone = network.network.predict_layers(IMAGES.double(), MASK)
    for one, other in zip(alone[:2], found[:2], strict=True):
        torch.testing.assert_close(one, other[:layers], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in sets.groups.parameters():
            parameter += 1
    other_group = network(IMAGES.double(), MASK, noise[0])
    mixed = NoisedTargets(*(torch.stack((a[:, 0], b[:, 1]), 1) for a, b in zip(*noise, strict=True)))
    other_noise = network(IMAGES.double(), MASK, mixed)
    for before, group, after in zip(found[:2], other_group[:2], other_noise[:2], strict=True):
        of_set = lambda each, number: each[number * layers : (number + 1) * layers]  # noqa: E731
        changed = [not torch.equal(of_set(before, number), of_set(group, number)) for number in range(4)]
        assert changed == [False, True, False, False]
        changed = [not torch.equal(of_set(group, number), of_set(after, number)) for number in range(4)]
        assert changed == [False, False, False, True]


@pytest.mark.usefixtures("one_narrow_block_a_stage")
@pytest.mark.parametrize("padded", [True, False])
def test_backends_agree_on_sets(padded: bool) -> None:
    """Those that take packed tokens see sets as so many more images."""
    (network, _), found = make(NARROW, groups=2, denoising=1), []
    noise = noise_of(targets_of(2, 1, 0, classes=5), NARROW, 1)
    backends: tuple[Attention, ...] = ("ref", "sdpa", "triton")
    for attention in backends:
        select_backends(network.network, attention=attention)
        found.append(network(IMAGES[:, :, :32], MASK[:, :32] if padded else None, noise))
    for other in found[1:]:
        torch.testing.assert_close(other.logits, found[0].logits, rtol=1e-4, atol=1e-5)


def test_where_an_image_has_few_tokens_all_sets_have_as_many_queries() -> None:
    config = replace(CONFIGS["encoder"], num_queries=40, size_divisible=8)
    (network, _), targets = make(config, groups=2, denoising=1), targets_of(30)
    found = network(torch.randn(1, 3, 32, 48), None, noise_of(targets, config, 1))
    assert found.logits.shape == (3 * 2, 1, 24, 6)
    assert build_criterion(6, scores="sigmoid")(found, targets)["loss"].isfinite()


def test_one_set_is_the_network_itself() -> None:
    """To the bit, in training: the outputs, the loss and the gradients."""
    for config in CONFIGS.values():
        (network, sets), gradients = make(config), []
        criterion, targets = build_criterion(6, scores=config.scores), targets_of(3, 0, 12)
        for forward in (network, network.network.predict_layers):
            network.zero_grad()
            terms = criterion(forward(IMAGES, MASK), targets)
            terms["loss"].backward()
            gradients.append([terms["loss"], *(each.grad for each in network.parameters() if each.requires_grad)])
        assert all(map(torch.equal, *gradients)) and not list(sets.parameters())


def test_denoising_is_judged_by_its_own_targets() -> None:
    """Query t by target t, the rest as no object; the network's own terms, the matched ones, stay as they are."""
    (network, _), targets = make(TINY, denoising=1), targets_of(3, 0, 12)
    found, criterion = network(IMAGES, MASK, noise_of(targets, TINY, 1)), build_criterion(6)
    terms = criterion(found, targets)
    alone = criterion(Predictions(found.logits[:2], found.boxes_cxcywh[:2]), targets)
    assert all(torch.equal(terms[name], value) for name, value in alone.items() if name != "loss")
    wanted = torch.full((3, 10), 6)
    for image, count in enumerate((3, 0, 10)):  # of twelve, ten have a query
        wanted[image, :count] = targets.labels[image, :count]
    weight = torch.tensor([1.0] * 6 + [0.1])
    expected = torch.zeros(())
    for logits, boxes in zip(found.logits[2:], found.boxes_cxcywh[2:], strict=True):
        expected = expected + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
        for image, count in enumerate((3, 0, 10)):
            pairs = boxes[image, :count], targets.boxes_cxcywh[image, :count]
            corners = [cxcywh_to_xyxy(each) for each in pairs]
            expected = expected + 5 * (pairs[0] - pairs[1]).abs().sum() / 15
            expected = expected + 2 * (1 - generalized_box_iou(*corners).diag()).sum() / 15
    torch.testing.assert_close(terms["loss_denoising"], expected)
    torch.testing.assert_close(terms["loss"], alone["loss"] + expected)
    twice = build_criterion(6, LossWeights(denoising=2.0))(found, targets)
    torch.testing.assert_close(twice["loss"], alone["loss"] + 2 * expected)


MANY = replace(TINY, num_queries=60)


def test_a_denoising_set_is_targets_noised_less_and_more_and_random_boxes() -> None:
    counts = (5, 20, 0, 35, 70)
    targets = targets_of(*counts)
    found = noise_of(targets, MANY, 40)
    assert found.labels.shape == (5, 40, 60) and found.boxes_cxcywh.shape == (5, 40, 60, 4)
    assert found.boxes_cxcywh.min() >= 0 and found.boxes_cxcywh.max() <= 1
    assert found.labels.min() >= 0 and found.labels.max() <= 5
    for image, count in enumerate(counts):
        for first, negative in ((0, 0), (count, 1)):
            seen = max(0, min(count, 60 - first))  # the rest finds no query
            boxes, wanted = found.boxes_cxcywh[image, :, first : first + seen], targets.boxes_cxcywh[image, :seen]
            sides = wanted[:, 2:]
            noise = torch.cat(
                ((boxes - wanted)[..., :2] / (0.5 * sides), (boxes - wanted)[..., 2:] / (0.4 * sides)), -1
            )
            if seen:
                assert negative - 1e-4 <= noise.abs().min() and noise.abs().max() <= negative + 1 + 1e-4
                assert noise.abs().max() > negative + 0.9 and noise.abs().min() < negative + 0.1
                assert noise.flatten(0, 1).mean(0).abs().max() < 0.25  # in all directions
                same = (found.labels[image, :, first : first + seen] == targets.labels[image, :seen]).float().mean()
                assert same == pytest.approx(1 - 0.2 * 5 / 6, abs=0.05)
        random = cxcywh_to_xyxy(found.boxes_cxcywh[image, :, 2 * count :])
        overlap = iou(random[..., None, :], cxcywh_to_xyxy(targets.boxes_cxcywh[image, :count]))
        assert not overlap.numel() or (overlap.amax(-1) > 0.3).float().mean() < 0.002
        assert not random.numel() or random.std(dim=(0, 1)).min() > 0.1


def test_noise_stays_inside_the_image_and_keeps_its_amount() -> None:
    """A center that would leave the image goes the other way: a negative at the edge is none of the target."""
    edge = Targets.from_list([{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.02, 0.98, 0.1, 0.1]])}])
    boxes = noise_of(edge, MANY, 500).boxes_cxcywh[0]
    assert boxes.min() >= 0 and boxes.max() <= 1
    shift = (boxes[:, :2, :2] - torch.tensor([0.02, 0.98])).abs() / 0.05
    assert shift[:, 0].max() <= 1.001 and shift[:, 1].min() >= 0.999 and shift[:, 1].max() <= 2.001


def test_noise_has_one_shape_and_each_image_its_own() -> None:
    """What an image gets does not depend on how many rows of padding its targets have, nor on the others' count."""
    targets = targets_of(3, 0, 12)
    expected = noise_of(targets, TINY, 2)
    for found in (noise_of(targets.pad_rows(), TINY, 2), noise_of(targets.pad_rows(64), TINY, 2)):
        assert all(map(torch.equal, found, expected))
    empty = noise_of(
        Targets.from_list([{"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]), TINY, 2
    )
    assert empty.labels.shape == (1, 2, 10) and empty.boxes_cxcywh.isfinite().all()
    assert own_queries(targets, 10).tolist() == [[0, 1, 2] + [-1] * 9, [-1] * 12, [*range(10), -1, -1]]


def step_of(config: ModelConfig = CONFIGS["encoder"], groups: int = 2, denoising: int = 1, **more: Any) -> Any:
    return make_step(config, groups=groups, denoising=denoising, learning_rate=1e-3, **more)


def numbers(step: Any, batches: list[Batch], seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    return {name: value.item() for name, value in step(batches).items()}


def trained_gradients(step: Any) -> list[Tensor]:
    return [each.grad.clone() for each in step.trained]


@each_config
def test_everything_learns_and_nothing_stays_behind(config: ModelConfig) -> None:
    """In steps with an EMA model: that and the model have no entry more, and every weight of the sets learns."""
    step = step_of(config, decay=0.9)
    before = [each.detach().clone() for each in step.sets.parameters()]
    for _ in range(2):  # a box head that begins as zeros passes on no gradient in the first
        terms = numbers(step, [make_batch([(64, 64), (64, 48)], [3, 1])])
    assert terms["loss_denoising"] > 0
    for network in (step.model, step.ema):
        assert network.state_dict().keys() == DETR(config).state_dict().keys()
    assert not any(map(torch.equal, before, step.sets.parameters()))
    assert all(each.grad is not None and each.grad.any() for each in step.sets.parameters())


def test_noise_is_drawn_anew_in_each_step_and_again_from_the_same_seed() -> None:
    batch = make_batch([(64, 64)], [3])
    losses = [numbers(step_of(), [batch], seed)["loss_denoising"] for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_recomputed_activations_have_the_same_gradients() -> None:
    found = []
    for recomputed in (False, True):
        step = step_of(replace(CONFIGS["encoder"], dropout=0.1))
        step.model.transformer.checkpoint_activations = recomputed
        numbers(step, [make_batch([(64, 64), (64, 48)], [3, 1])])
        found.append(trained_gradients(step))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def require_same_step(one: Any, other: Any, gradients: list[list[Tensor]]) -> None:
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * max(mine.norm(), 1e-3 * one["grad_norm"])


COUNTS = (3, 0, 12, 1)


def some(*indices: int) -> Batch:
    """Images of which one has more objects than there are queries."""
    return collate([make_sample(index, objects=COUNTS[index]) for index in indices])


@pytest.mark.parametrize("name", ["detr", "encoder"])
def test_micro_batches_make_the_step_of_the_joined_batch(name: str) -> None:
    found, gradients = [], list[list[Tensor]]()
    for batches, count in (([some(0, 1, 2, 3)], 1), ([some(0, 1), some(2, 3)], 1), ([some(0, 1, 2, 3)], 2)):
        step = step_of(CONFIGS[name], groups=3, denoising=0, clip=0.0)
        step.model.eval()  # where no image's batch norm depends on another
        running = MicroBatches(step)
        running.count = count
        found.append(numbers(running, batches))
        gradients.append(trained_gradients(step))
    for other in (1, 2):
        require_same_step(found[0], found[other], [gradients[0], gradients[other]])


def on_one_rank(world: World) -> tuple[dict[str, float], list[Tensor], dict[str, float]]:
    """A step of three groups on this rank's half of four images; and whether one with noise is another on each."""
    step = step_of(groups=3, denoising=0, world=world, clip=0.0)
    step.model.eval()
    own = range(4)[world.rank * 4 // world.size : (world.rank + 1) * 4 // world.size]
    terms, gradients = numbers(step, [some(*own)]), trained_gradients(step)
    terms["loss"] = world.sum(torch.tensor(terms["loss"])).item() / world.size
    return terms, gradients, numbers(step_of(world=world), [some(0)], seed=world.rank)


def test_two_ranks_make_the_step_of_one(tmp_path: Path) -> None:
    terms, gradients, _ = on_one_rank(World())
    ranks = run_processes(on_one_rank, 2, tmp_path)
    for found, theirs, _ in ranks:
        require_same_step(terms, found, [gradients, theirs])
    assert ranks[0][2]["loss_denoising"] != ranks[1][2]["loss_denoising"]
    assert ranks[0][2]["grad_norm"] == ranks[1][2]["grad_norm"]


def test_one_graph_serves_any_number_of_targets() -> None:
    """With noise that each replay draws anew; the numbers are those of the uncaptured step."""
    plain, capturer = step_of(), StandIn()
    captured = GraphedStep(MicroBatches(step_of()), capturer)
    for number, count in enumerate((2, 0, 16, 5, 0)):
        batch = make_batch([(64, 64), (64, 48)], [count, count // 2], seed=number)
        batch = replace(batch, targets=batch.targets.pad_rows())
        assert numbers(captured, [batch], number) == pytest.approx(numbers(plain, [batch], number), rel=1e-5, abs=1e-7)
    assert (capturer.captured, capturer.replayed) == (1 + 1, 4 + 4)


@pytest.mark.usefixtures("unrendered")
def test_a_run_leaves_the_network_alone(shapes_root: Path, tmp_path: Path) -> None:
    """Its last state has what the sets learned, for resuming; who loads a model from it, or starts from it, has none.

    That such a run is resumed to the bit: tests/test_training.py.
    """
    options = begun(shapes_root, output=str(tmp_path), groups=2, denoise=1, ema=0.9, **PROPOSING)
    assert main(options) == 0
    last, best = (tmp_path / "checkpoints" / name for name in ("last.pt", "best.pt"))
    state = read_container(last)
    assert state["query_sets"].keys() == QuerySets(load_model(best).config, 2, 1).state_dict().keys()
    for path in (best, last):
        assert export_state_dict(load_model(path)).keys() == state["model"].keys() == state["ema"].keys()
    assert main(options.but(output=str(tmp_path / "more"), weights=str(last), groups=3, denoise=0)) == 0
