"""A batch that does not fit into the memory is computed in micro-batches: the same step, on all ranks."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_fast.config import UserError
from detr_fast.data.batch import Batch
from detr_fast.model.detr import DETR, MoreQueries, Predictions
from detr_fast.options import TrainOptions
from detr_fast.train import main
from detr_fast.training.build import Extremes, extremes_of, largest_batch, make_data
from detr_fast.training.distributed import World
from detr_fast.training.graphed_step import GraphedStep
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.recipes import RECIPES
from tests import factories
from tests.factories import TINY, make_batch, run_processes
from tests.stand_in import StandIn

OPTIONS = TrainOptions.of(
    model="detr_tiny", train_sizes=(64,), max_size=64, batch_size=4, device="cpu", precision="fp32"
)
EXTREMES = Extremes(objects=10, mixed=False, padded=False)


def bound(model: DETR, room: list[int]) -> None:
    """On a device that holds the activations of `room[0]` images; what the forward pass changes, it has changed when
    the memory runs out."""
    predict_layers = model.predict_layers

    def bounded(images: Tensor, mask: Tensor | None = None, more: MoreQueries | None = None) -> Predictions:
        predictions = predict_layers(images, mask, more)
        if len(images) > room[0]:
            raise torch.OutOfMemoryError("no room")
        return predictions

    model.predict_layers = bounded  # type: ignore[method-assign]


def make_step(holds: int = 99, world: World | None = None, dropout: float = 0.0) -> MicroBatches:
    """On a device that holds the activations of so many images; in evaluation mode, where no image's batch norm
    depends on another."""
    step = factories.make_step(replace(TINY, dropout=dropout), world=world)
    bound(step.model.eval(), [holds])
    return MicroBatches(step)


def batch() -> Batch:
    """Five images of two sizes, with up to four objects."""
    return make_batch([(64, 64 - 16 * (index % 2)) for index in range(5)], range(5))


def test_a_split_batch_keeps_its_images_and_their_room() -> None:
    whole = batch()
    halves = whole.split(2)
    assert [half.image_ids for half in halves] == [[0, 1, 2], [3, 4]]
    assert all(half.padded_size == whole.padded_size for half in halves)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.images, [x for half in halves for x in half.images], strict=True)
    )
    assert torch.equal(torch.cat([half.targets.boxes_cxcywh for half in halves]), whole.targets.boxes_cxcywh)
    assert len(whole.split(99)) == 5 and whole.split(1)[0].image_ids == whole.image_ids


def test_micro_batches_make_the_step_of_the_whole_batch() -> None:
    one, other = make_step(), make_step()
    other.count = 3
    terms, same = one([batch()]), other([batch()])
    for name in (name for name in terms if name.startswith("loss") or name == "grad_norm"):
        assert same[name].item() == pytest.approx(terms[name].item(), rel=1e-4, abs=1e-6), name
    for mine, theirs in zip(one.step.trained, other.step.trained, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 1e-4 * max(1e-3, mine.grad.norm().item())


@pytest.mark.parametrize(("holds", "count"), [(4, 1), (3, 2), (2, 2), (1, 4)])
def test_micro_batches_are_halved_until_they_fit_and_nothing_is_trained(holds: int, count: int) -> None:
    micro_batches = make_step(holds)
    step = micro_batches.step
    step.model.train()  # whose batch norm gathers statistics
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    numbers = torch.get_rng_state()
    micro_batches.find_micro_batch_size(largest_batch(OPTIONS, TINY, EXTREMES))
    assert micro_batches.count == count
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.trained) and not step.optimizer.state
    assert torch.equal(numbers, torch.get_rng_state())
    assert micro_batches([batch().split(2)[0]])["loss"].isfinite() if holds > 1 else True


def test_an_image_that_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"64x64 pixels.*--checkpoint-activations"):
        make_step(0).find_micro_batch_size(largest_batch(OPTIONS, TINY, EXTREMES))


@pytest.mark.parametrize("holds", [3, 1])
def test_memory_that_runs_out_in_the_middle_of_a_run(holds: int) -> None:
    """From the third step on, in its second batch: as if from there on all had been computed in these micro-batches,
    dropout, batch norm's statistics and the log's sums included."""
    found = []
    for runs_out in (True, False):
        micro_batches = make_step(dropout=0.1)
        model = micro_batches.step.model.train()
        room = [99]
        bound(model, room)
        losses = []
        for number in range(4):
            torch.manual_seed(number)
            if number == 2 and runs_out:
                room[0] = holds
            elif number == 2:
                micro_batches.count = {3: 2, 1: 8}[holds]
            with pytest.warns(match="from now on each batch") if number == 2 and runs_out else nullcontext():
                losses.append(micro_batches([batch().split(5)[1], batch()])["loss"].item())
        sums = micro_batches.step.sums.read()[1]
        found.append((micro_batches.count, losses, sums, list(model.state_dict().values())))
    one, other = found
    assert one[:2] == other[:2] and torch.equal(one[2], other[2])
    assert all(map(torch.equal, one[3], other[3]))


def test_single_images_that_no_longer_fit_are_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"64x64 pixels.*--checkpoint-activations"):
        make_step(0)([batch()])


def test_several_processes_do_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "sum", lambda _, value: value)
    micro_batches = make_step(0)
    micro_batches.step.world = World(0, 2, 0)
    with pytest.raises(torch.OutOfMemoryError):
        micro_batches([batch()])
    assert micro_batches.count == 1


def test_a_run_says_that_its_memory_ran_out(shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_layers, calls = DETR.predict_layers, 0

    def bounded(self: DETR, images: Tensor, mask: Tensor | None = None, more: MoreQueries | None = None) -> Predictions:
        nonlocal calls
        calls += 1
        if calls > 2 and len(images) > 4:
            raise torch.OutOfMemoryError("no room")
        return predict_layers(self, images, mask, more)

    monkeypatch.setattr(DETR, "predict_layers", bounded)
    options = RECIPES["tiny"].but(data=str(shapes_root), output=str(tmp_path), epochs=1, batch_size=8)
    with pytest.warns(match="from now on each batch is computed in 2 micro-batches") as warned:
        assert main(options.but(device="cpu", precision="fp32")) == 0
    assert sum("The memory ran out" in str(each.message) for each in warned) == 1


@pytest.mark.parametrize(
    ("extremes", "padded_size", "size"),
    [
        (Extremes(20, mixed=False, padded=True), (832, 1344), (831, 1343)),
        (Extremes(0, mixed=True, padded=False), (1344, 1344), (1344, 1344)),
    ],
)
def test_the_largest_batch_is_as_large_as_training_can_ask_for(
    extremes: Extremes, padded_size: tuple[int, int], size: tuple[int, int]
) -> None:
    options = OPTIONS.but(train_sizes=(480, 800), max_size=1333, batch_size=3)
    largest = largest_batch(options, TINY, extremes)
    assert largest.padded_size == padded_size and set(largest.images.sizes) == {size} and len(largest.images) == 3
    assert largest.padded == extremes.padded and largest.targets.labels.shape == (3, extremes.objects)


def test_what_training_can_meet_is_known_from_the_annotations(shapes_root: Path) -> None:
    options = RECIPES["tiny"].but(data=str(shapes_root), model="detr_tiny")
    train_set, _, _ = make_data(options)
    most = max(len(record.labels) for record in train_set.records)
    assert extremes_of(options, train_set, 256) == (most, False, False)
    assert extremes_of(options, train_set, 256 + 3) == (most, True, False)
    several = options.but(train_sizes=(48, 64), buckets=False)
    assert extremes_of(several, train_set, 256) == (most, True, True)


def with_too_little_on_one(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {"counts": []}
    for name in ("plain", "captured"):
        step: Any = make_step(2 if world.rank == 0 else 99, world)
        running = step if name == "plain" else GraphedStep(step, StandIn())
        running.find_micro_batch_size(largest_batch(OPTIONS, TINY, EXTREMES))
        found[name] = running([batch().split(2)[1]])["grad_norm"]
        found["counts"].append(step.count)
    return found


def test_all_ranks_split_where_one_has_too_little(tmp_path: Path) -> None:
    first, second = run_processes(with_too_little_on_one, 2, tmp_path)
    assert first["counts"] == second["counts"] == [2, 2]
    assert first["captured"].item() == pytest.approx(first["plain"].item(), rel=1e-5)
    assert first["plain"].item() == pytest.approx(second["plain"].item(), rel=1e-6)
