"""A step of CUDA graphs makes the same numbers as the eager one; what captures is CUDA on a GPU, a stand-in here."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_kernels import Selection
from detr_profiling.mixed_sizes import order_of
from torch import Tensor

from detr_fast.config import ModelConfig, UserError
from detr_fast.cuda_graphs import Call, cudnn_benchmark
from detr_fast.data.batch import Batch
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR
from detr_fast.options import Attention
from detr_fast.training.build import SHAPE_STEP_PX
from detr_fast.training.distributed import World
from detr_fast.training.graphed_step import MOST_GRAPHS, GraphedStep, why_not_graphed
from detr_fast.training.meter import Meter
from detr_fast.training.micro_batches import MicroBatches
from detr_fast.training.optimizer import Schedule
from detr_fast.training.step import TrainStep
from tests import factories
from tests.factories import PROPOSING, TINY, make_batch, run_processes
from tests.stand_in import StandIn

CONFIG = replace(TINY, dropout=0.1)
SCHEDULE = Schedule("cosine", 20, 10, 3)


def make_step(decay: float = 0.0, config: ModelConfig = CONFIG, **others: Any) -> TrainStep:
    return factories.make_step(config, decay=decay, learning_rate=1e-3, **others)


def graphed(step: TrainStep, capturer: StandIn) -> GraphedStep:
    return GraphedStep(MicroBatches(step), capturer)


def batch(seed: int, size: tuple[int, int], objects: int, pad_rows: bool = True, narrower: int = 8) -> Batch:
    """Two images, the second one narrower by so many pixels."""
    made = make_batch([size, (size[0], size[1] - narrower)], [objects, objects], 2 * seed)
    # as a captured step has them: with other rows of padding sums are in another order
    return replace(made, targets=made.targets.pad_rows()) if pad_rows else made


WIDE, HIGH = (48, 64), (64, 48)
# two shapes in turn, targets of any number below 16, and once more of them
BATCHES = [(WIDE, 3), (WIDE, 1), (HIGH, 2), (WIDE, 0), (HIGH, 5), (HIGH, 3), (WIDE, 20), (WIDE, 17), (WIDE, 2)]
AnyStep = TrainStep | MicroBatches | GraphedStep


def train_step(step: AnyStep) -> TrainStep:
    return step if isinstance(step, TrainStep) else step.step


def schedule(step: AnyStep, number: int) -> None:
    optimizer = train_step(step).optimizer
    SCHEDULE.apply(optimizer, number)
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(group["lr"]).item()  # float32, as on the device


def run(step: AnyStep, accumulate: int = 1, numbers: Iterable[int] = range(len(BATCHES))) -> list[dict[str, float]]:
    """The terms of each step; learning rate and dropout's seed as the loop sets them."""
    found = []
    for number in numbers:
        size, objects = BATCHES[number]
        torch.manual_seed(number)
        schedule(step, number)
        batches = [batch(100 * number + index, size, objects) for index in range(accumulate)]
        found.append({name: value.item() for name, value in step(batches).items()})
    return found


def test_the_log_has_the_means_of_the_steps() -> None:
    """Read twice, each time anew, between shapes that are captured and shapes that are not."""
    for captured in (False, True):
        step = make_step()
        meter = Meter(step.runtime.device, step.world, step.sums)
        running = graphed(step, StandIn()) if captured else step
        places = []
        for part in (slice(0, 4), slice(4, None)):
            terms = run(running, numbers=range(len(BATCHES))[part])
            for _ in terms:
                meter.add(images=2, wait_seconds=0.0)
            read = meter.read()
            assert read["images_per_second"] > 0
            for name in terms[0]:
                mean = sum(each[name] for each in terms) / len(terms)
                assert read[name] == pytest.approx(mean, rel=1e-5, abs=1e-7), name
            places.append([each.data_ptr() for each in step.sums.sums.values()])
        assert places[0] == places[1]  # all that a graph knows of them


@pytest.mark.parametrize(
    ("accumulate", "muon", "config"),
    [(1, False, CONFIG), (2, False, CONFIG), (1, True, CONFIG), (2, False, replace(CONFIG, **PROPOSING))],
)
def test_the_same_numbers_as_without(accumulate: int, muon: bool, config: ModelConfig) -> None:
    plain, captured, capturer = (*(make_step(0.9, config, muon=muon) for _ in range(2)), StandIn())
    for expected, found in zip(run(plain, accumulate), run(graphed(captured, capturer), accumulate), strict=True):
        assert found == expected
    assert plain.ema is not None and captured.ema is not None
    for one, other in ((plain.model, captured.model), (plain.ema, captured.ema)):
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    # each of three shapes of micro-batches runs once uncaptured, and so does the first update
    assert (capturer.captured, capturer.replayed) == (3 + 1, 9 * accumulate - 3 + 8)


def test_room_for_targets_changes_no_term() -> None:
    torch.manual_seed(0)
    expected, found = (make_step()([batch(1, WIDE, 3, pad_rows)]) for pad_rows in (False, True))
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_a_scaled_loss_and_a_step_that_is_skipped(muon: bool) -> None:
    """As fp16 has it. The gradient that is not finite comes once in a step that runs, once in a replay."""
    found = {}
    for name in ("plain", "captured"):
        step, factor, steps = make_step(0.9, muon=muon), torch.ones(()), []
        running: AnyStep = step
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        step.model.query_embed.weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        if name == "captured":
            running = graphed(step, StandIn())
        for number in range(len(BATCHES)):
            factor.fill_(float("inf") if number in (2, 5) else 1.0)
            before = [each.detach().clone() for each in step.model.parameters()]
            (terms,) = run(running, numbers=[number])
            same = all(map(torch.equal, step.model.parameters(), before))
            steps.append(terms | {"scale": step.scaler.get_scale(), "same": float(same)})
        found[name] = steps
    for expected, terms in zip(found["plain"], found["captured"], strict=True):
        assert terms == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert [each["skipped"] for each in found["captured"]] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert [each["same"] for each in found["captured"]] == [0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert [each["scale"] for each in found["captured"]] == [1024, 1024, 512, 512, 512, 256, 256, 256, 512]


def test_a_shape_is_captured_once_and_its_memory_is_read_anew() -> None:
    step, capturer = make_step(), StandIn()
    captured = graphed(step, capturer)
    first, second = batch(1, WIDE, 3), batch(2, WIDE, 3)
    losses = []
    for given in (first, first, second, first):
        torch.manual_seed(0)
        step.optimizer.param_groups[0]["lr"].fill_(0)  # nothing is learned, so a batch has one loss
        step.optimizer.param_groups[1]["lr"].fill_(0)
        losses.append(captured([given])["loss"].item())
    assert capturer.captured == 1 + 1 and capturer.replayed == 3 + 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[1] == pytest.approx(losses[3], rel=1e-6)
    assert losses[2] != pytest.approx(losses[1], rel=1e-3)


def test_the_learning_rate_is_read_at_each_replay() -> None:
    step = make_step()
    captured = graphed(step, StandIn())
    for _ in range(2):
        captured([batch(1, WIDE, 3)])
    SCHEDULE.apply(step.optimizer, 0)
    assert all(isinstance(group["lr"], Tensor) for group in step.optimizer.param_groups)
    assert float(step.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3 * SCHEDULE.factor(0))
    before = step.model.query_embed.weight.detach().clone()
    for group in step.optimizer.param_groups:
        group["lr"].fill_(0)
    captured([batch(1, WIDE, 3)])
    assert torch.equal(step.model.query_embed.weight, before)


def test_an_optimizer_that_was_captured_goes_on_without() -> None:
    captured, plain = make_step(), make_step()
    graphed(captured, StandIn())([batch(1, WIDE, 3)])
    plain.optimizer.load_state_dict(captured.optimizer.state_dict())
    SCHEDULE.apply(plain.optimizer, 1)
    assert plain([batch(1, WIDE, 3)])["loss"].isfinite()


def test_shapes_without_end_are_run_as_they_are() -> None:
    capturer = StandIn()
    step = graphed(make_step(), capturer)
    step.gradient_graphs.max_graphs = 1
    for size in (WIDE, WIDE, HIGH):
        step([batch(1, size, 3)])
    with pytest.warns(UserWarning, match="of other shapes run uncaptured"):
        step([batch(1, HIGH, 3)])
    assert step([batch(1, HIGH, 3)])["loss"].isfinite()
    assert (capturer.ran, capturer.captured, capturer.replayed) == (4 + 1, 1 + 1, 1 + 4)


def test_steps_of_any_shapes_are_made_of_the_same_graphs() -> None:
    """No two steps are alike, but their micro-batches are: two sizes, with and without padding."""
    capturer = StandIn()
    plain, captured = MicroBatches(make_step()), graphed(make_step(), capturer)
    plain.count = captured.micro_batches.count = 2
    sizes_of_steps = [(WIDE,), (WIDE, HIGH), (HIGH, WIDE, HIGH), (HIGH, HIGH, WIDE, WIDE)]
    for number, sizes in enumerate(sizes_of_steps):
        batches = [batch(10 * number + index, size, 3 + index) for index, size in enumerate(sizes)]
        terms = []
        for step in (plain, captured):
            torch.manual_seed(number)
            schedule(step, number)
            terms.append({name: value.item() for name, value in step(batches).items()})
        assert terms[1] == terms[0]
    assert capturer.captured == 4 + 1


def test_the_largest_shape_comes_first_and_nothing_is_trained() -> None:
    """Afterwards a batch of its shape, with fewer objects and nothing to pad, is a replay."""
    plain, inner, capturer = make_step(), make_step(), StandIn()
    before = {name: value.clone() for name, value in inner.model.state_dict().items()}
    captured = graphed(inner, capturer)
    numbers = torch.get_rng_state()
    captured.find_micro_batch_size(batch(1, WIDE, 20, pad_rows=False))
    assert (capturer.ran, capturer.captured, capturer.replayed) == (2, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in inner.model.state_dict().items())
    assert torch.equal(numbers, torch.get_rng_state()) and not inner.optimizer.state
    for number, narrower in enumerate((0, 8)):
        terms = []
        for step in (plain, captured):
            torch.manual_seed(number)
            schedule(step, number)
            found = step([batch(number, WIDE, 3, pad_rows=False, narrower=narrower)])
            terms.append({name: value.item() for name, value in found.items()})
        assert terms[1] == pytest.approx(terms[0], rel=1e-4, abs=1e-6)
    assert (capturer.captured, capturer.replayed) == (1 + 1, 1 + 2 + 1)


@pytest.mark.parametrize("attention", ["ref", "sdpa"])
def test_a_mask_that_hides_nothing_changes_nothing(attention: Attention) -> None:
    """So a captured step may give one to every batch. In float64, where rounding cannot hide a difference."""
    torch.manual_seed(0)
    model = DETR(replace(CONFIG, dropout=0.0)).eval().double()
    select_backends(model, "ref", attention, torch.float64)
    images, gradients = torch.randn(2, 3, 64, 96, dtype=torch.float64), []
    for mask in (None, torch.zeros(2, 64, 96, dtype=torch.bool)):
        model.zero_grad()
        outputs = model(images, mask)
        (outputs["pred_boxes"].sum() + outputs["pred_logits"].square().sum()).backward()
        gradients.append([each.grad for each in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * one.abs().max().item())


class Full(StandIn):
    """On a device whose memory runs out at given calls, counted from 1."""

    def __init__(self, run: int = 0, capture: int = 0) -> None:
        super().__init__()
        self.run_fails, self.capture_fails = run, capture

    def run(self, call: Call) -> Any:
        results = super().run(call)
        if self.ran == self.run_fails:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return results

    def capture(self, call: Call) -> Any:
        captured = super().capture(call)
        if self.captured == self.capture_fails:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return captured


def test_a_graph_that_does_not_fit_is_one_notice_and_its_shape_runs_eagerly() -> None:
    captured = graphed(make_step(), Full(capture=3))
    with pytest.warns(UserWarning, match="holds no more CUDA graphs") as notices:
        found = run(captured)
    assert found == run(make_step()) and len(notices) == 1
    assert not captured.gave_up and len(captured.gradient_graphs.graphs) == 1


def test_a_step_that_does_not_fit_beside_the_graphs_gives_them_up() -> None:
    """At a new shape, after two steps that were captured; dropout's and batch norm's state is as if it had not been."""
    plain, capturer = make_step(0.9), Full(run=3)
    captured = graphed(make_step(0.9), capturer)
    with pytest.warns(UserWarning, match="from now on steps run uncaptured") as notices:
        found = run(captured)
    for mine, theirs in zip(found, run(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert len(notices) == 1 and captured.gave_up and capturer.ran == 3
    for buffer, other in zip(captured.step.model.buffers(), plain.model.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


def test_of_several_processes_none_gives_its_graphs_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "sum", lambda _, value: value)
    step = make_step()
    step.world = World(0, 2, 0)
    with pytest.raises(UserError, match=r"captured step.*--batch-size"):
        graphed(step, Full(run=1))([batch(1, WIDE, 3)])


def test_what_does_not_fit_beside_its_graph_is_halved() -> None:
    """The batch's own graph, made and replayed, takes the memory for running it: its halves fit."""
    capturer = Full(run=2)
    step = graphed(make_step(), capturer)
    step.find_micro_batch_size(batch(1, WIDE, 3, pad_rows=False))
    assert step.micro_batches.count == 2 and capturer.forgotten > 1
    assert not step.gave_up and len(step.gradient_graphs.graphs) == 1


def test_a_graph_that_does_not_fit_when_it_is_tried_out_is_of_half_the_batch() -> None:
    step = graphed(make_step(), Full(capture=1))
    with pytest.warns(UserWarning, match="holds no more"):
        step.find_micro_batch_size(batch(1, WIDE, 3, pad_rows=False))
    assert step.micro_batches.count == 2 and not step.gave_up
    assert len(step.gradient_graphs.graphs) == 1 and step.gradient_graphs.max_graphs == MOST_GRAPHS


class NoRoom(StandIn):
    def capture(self, call: Call) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_where_no_graph_fits_single_images_may_without() -> None:
    step = graphed(make_step(), NoRoom())
    with pytest.warns(UserWarning, match="from now on steps run uncaptured"):
        step.find_micro_batch_size(batch(1, WIDE, 3, pad_rows=False))
    assert step.gave_up and step.micro_batches.count == 1
    assert step([batch(1, WIDE, 3)])["loss"].isfinite()


def test_a_shape_of_many_sizes_stays_below_what_is_captured() -> None:
    """Two groups of DETR's augmentation of COCO; benchmarks/NOTES.md has whole epochs."""
    for batch_size in (4, 16):
        padded_sizes = {
            shape.in_steps(SHAPE_STEP_PX).padded_size for seed in range(2) for shape in order_of(batch_size, seed, True)
        }
        assert len(padded_sizes) < MOST_GRAPHS


def test_cudnn_measures_only_where_asked() -> None:
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(ValueError), cudnn_benchmark(True):
        assert torch.backends.cudnn.benchmark
        raise ValueError
    with cudnn_benchmark(False):
        assert not torch.backends.cudnn.benchmark


def test_why_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA graphs do not run on cpu" in str(why_not_graphed(make_step()))
    step = make_step()
    step.runtime = replace(step.runtime, device=torch.device("cuda"))
    assert "SciPy" in str(why_not_graphed(step))
    step.criterion.use(Selection.named(assignment="triton"))
    monkeypatch.setattr("detr_kernels.launch.why_not_triton", lambda _: None)
    step.world = World(0, 2, 0)
    assert why_not_graphed(step) is None
    step.model.transformer.checkpoint_activations = True
    assert "--checkpoint-activations" in str(why_not_graphed(step))


def ranks_batches(rank: int, number: int) -> list[Batch]:
    """Steps of one or two batches, whose shapes and counts differ between the ranks and come back."""
    sizes = [(WIDE, HIGH, WIDE, HIGH, WIDE, WIDE), (HIGH, HIGH, HIGH, WIDE, WIDE, HIGH)][rank]
    count = 1 + number // 3 % 2
    return [batch(100 * number + 10 * rank + index, sizes[number % 6], 2 + rank - index) for index in range(count)]


def plain_and_captured(world: World) -> dict[str, Any]:
    """Both steps' terms, weights and counts of captures and replays, on one of two ranks."""
    result = {}
    for name in ("plain", "captured"):
        step, capturer, terms = make_step(0.9, world=world), StandIn(), []
        running: AnyStep = step
        if name == "captured":
            wrapper = weakref.ref(step.synchronized)
            running = graphed(step, capturer)
            assert wrapper() is None  # with it goes the exchange that it hangs on every gradient
        for number in range(12):
            torch.manual_seed(2 * number + world.rank)
            schedule(running, number)
            found = running(ranks_batches(world.rank, number))
            terms.append({key: value.item() for key, value in found.items()})
        assert step.ema is not None
        weights = [each.detach() for model in (step.model, step.ema) for each in model.parameters()]
        result[name] = {"terms": terms, "weights": weights, "counts": (capturer.captured, capturer.replayed)}
    return result


def test_several_processes_that_capture_at_different_steps(tmp_path: Path) -> None:
    """The graphed step is DistributedDataParallel's to the last bit."""
    ranks = run_processes(plain_and_captured, 2, tmp_path)
    for rank in ranks:
        assert rank["captured"]["terms"] == rank["plain"]["terms"]
        assert all(map(torch.equal, rank["captured"]["weights"], rank["plain"]["weights"]))
    assert all(map(torch.equal, ranks[0]["captured"]["weights"], ranks[1]["captured"]["weights"]))
    assert ranks[0]["captured"]["terms"] != ranks[1]["captured"]["terms"]
    assert [rank["captured"]["counts"] for rank in ranks] == [(2 + 1, 16 + 11)] * 2
