"""What is measured is the same for all: weights, batch, and what is computed from them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from detr_kernels import resize_normalize_pad
from detr_profiling.baselines.build import BASELINES, build_baseline
from detr_profiling.baselines.plain_loop import plain_feed
from detr_profiling.batches import batch_shapes, make_batches, observed_batch
from detr_profiling.comparison.closeness import assert_close, scaled_tolerance
from detr_profiling.measuring import timing as timing_file
from detr_profiling.measuring.timing import Timing, calls_a_run, measure
from detr_profiling.mixed_sizes import padding
from detr_profiling.own_workload import build_workload
from detr_profiling.workload import MOST_OBSERVED, WorkloadOptions
from torch import nn
from torch.nn import functional as F

from detr_fast.config import UserError
from detr_fast.detector import Detector
from detr_fast.model.detr import DETR
from detr_fast.preprocessing import Preprocessing
from tests.planted_clock import PlantedClock
from tests.stand_in import StandIn

OPTIONS = WorkloadOptions.of(size="64x96", batch_size=2, device="cpu", precision="fp32", objects=3)
INFERENCE = OPTIONS.but(mode="inference")


@pytest.mark.parametrize("options", [OPTIONS, INFERENCE], ids=["training", "inference"])
def test_ours_computes_what_the_reference_does(options: WorkloadOptions) -> None:
    found, exact, eager = (
        workload.observe()
        for workload in (
            build_workload(options),
            build_baseline("reference", options, torch.float64),
            build_baseline("reference", options),
        )
    )
    assert found.keys() == exact.keys()
    assert ("loss" in found) == (options.mode == "training")
    for name in ("logits", "boxes", *(name for name in found if name.startswith("loss"))):
        assert_close(found[name], exact[name], eager[name], scaled_tolerance(exact[name], 1e-5), name)
    if options.mode == "training":
        joined = [torch.cat([each[name].flatten() for name in found if "gradient" in name]) for each in (found, exact)]
        # a ReLU at its kink moves single gradients at once by a little
        assert (joined[0] - joined[1]).norm() < 2e-3 * joined[1].norm()
        assert torch.equal(found["matches"], exact["matches"]) and (found["matches"] >= 0).any()


def test_a_run_trains_and_an_observation_does_not() -> None:
    workload = build_workload(OPTIONS)
    assert workload.observe is not None
    first, again = workload.observe(), workload.observe()
    assert all(torch.equal(first[name], again[name]) for name in first)
    workload.run()
    assert not torch.equal(workload.observe()["logits"], first["logits"])
    assert workload.model.training


@pytest.mark.parametrize("name", [baseline for baseline in BASELINES if baseline != "hf-compiled"])
def test_baselines_train_and_infer(name: str) -> None:
    if name.startswith("hf"):
        pytest.importorskip("transformers", reason="pip install 'detr-fast[reference]'")
    trained = build_baseline(name, OPTIONS)
    before = [parameter.detach().clone() for parameter in trained.model.parameters() if parameter.requires_grad]
    assert trained.run().isfinite()
    after = [parameter for parameter in trained.model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    inferred = build_baseline(name, INFERENCE)
    inferred.run()
    if name.startswith("hf"):
        found, exact = inferred.observe(), build_baseline("reference", INFERENCE).observe()
        assert (found["logits"] - exact["logits"]).abs().max() < 1e-4


def test_the_batch_is_ragged_and_from_the_seed_alone() -> None:
    [batch], [again] = make_batches(OPTIONS, 91), make_batches(OPTIONS, 91)
    assert torch.equal(batch.images.buffer, again.images.buffer) and torch.equal(
        batch.targets.labels, again.targets.labels
    )
    assert batch.padded and batch.padded_size == (64, 96) and batch.images.sizes == [(64, 96), (64, 84)]
    assert [image.shape[:2] for image in batch.images] == [(38, 58), (38, 50)], "0.6 of it: they have to be resized"
    assert batch.original_sizes.tolist() == [[38, 58], [38, 50]]
    assert [place.hflip for place in batch.images.slots] == [0, 1]
    assert not any(place.hflip for place in make_batches(INFERENCE, 91)[0].images.slots)
    embedded = make_batches(OPTIONS.but(model="detr_tiny"), 91)[0]
    assert [image.shape[:2] for image in embedded.images] == embedded.images.sizes
    assert not torch.equal(batch.images.buffer, make_batches(OPTIONS.but(seed=1), 91)[0].images.buffer)
    assert not make_batches(OPTIONS.but(batch_size=1), 91)[0].padded


@pytest.mark.parametrize("name", ["detr_fast", "reference", "hf-sdpa"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_run_is_a_step_with_each_of_the_batches_of_mixed_sizes(name: str, mode: Any) -> None:
    options = OPTIONS.but(size_mix="mixed", mode=mode, model="detr_tiny")
    if name.startswith("hf"):
        pytest.importorskip("transformers", reason="pip install 'detr-fast[reference]'")
        options = options.but(model="detr_r50")
    workload = build_workload(options) if name == "detr_fast" else build_baseline(name, options)
    seen: list[tuple[int, ...]] = []

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(tuple((named["pixel_values"] if name.startswith("hf") else given[0]).shape))

    # ours is not called in training: its layers are predicted at once
    hooked = workload.model.backbone if isinstance(workload.model, DETR) else workload.model
    hooked.register_forward_pre_hook(note, with_kwargs=True)
    workload.run()
    assert seen == [(2, 3, *shape.padded_size) for shape in batch_shapes(workload.options)]
    assert len(set(seen)) == (4 if mode == "inference" else 2)  # sides are rounded up in training alone


def test_batches_of_mixed_sizes_are_padded_as_their_shapes_say() -> None:
    mixed = OPTIONS.but(size_mix="mixed", batch_size=4)
    random, bucketed = (make_batches(mixed.but(buckets=buckets), 91) for buckets in (False, True))
    for options, batches in ((mixed.but(buckets=False), random), (mixed, bucketed)):
        shapes = batch_shapes(options)
        assert [(batch.images.sizes, batch.padded_size) for batch in batches] == shapes
        assert padding(shapes) == pytest.approx(
            sum(4 * h * w for h, w in (batch.padded_size for batch in batches))
            / sum(h * w for batch in batches for h, w in batch.images.sizes)
        )
    large = mixed.but(size="800x1066")  # of which rounding up to 32 pixels is little
    assert padding(batch_shapes(large.but(buckets=False))) > 1.3 * padding(batch_shapes(large))
    compiled = batch_shapes(mixed.but(compile=True))
    assert all(side % 64 == 0 for shape in compiled for side in shape.padded_size)
    assert [shape.sizes for shape in compiled] == [shape.sizes for shape in batch_shapes(mixed)]


def test_what_is_compared_has_one_size() -> None:
    mixed = OPTIONS.but(size_mix="mixed")
    for options in (mixed, mixed.but(buckets=False)):
        assert torch.equal(observed_batch(options, 91).images.buffer, observed_batch(OPTIONS, 91).images.buffer)


def test_what_is_compared_is_resized_without_rounding() -> None:
    batch = observed_batch(OPTIONS.but(size="14x20"), 91)
    assert batch.images.sizes == [(14, 20), (14, 18)] and batch.images.slots[1].hflip
    assert [image.shape[:2] for image in batch.images] == [(7, 10), (7, 9)]
    odd = observed_batch(OPTIONS.but(size="15x20", batch_size=1), 91)
    assert [image.shape[:2] for image in odd.images] == [(15, 10)]
    images, arguments = batch.images, (*batch.padded_size, (0.0,) * 3, (1 / 255,) * 3)
    exact = torch.zeros(2, 3, *batch.padded_size, dtype=torch.float64)
    for row, image, place in zip(exact, images, images.slots, strict=True):
        pixels = image.permute(2, 0, 1)[None].double()
        size = (place.new_height, place.new_width)
        resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0]
        row[:, : size[0], : size[1]] = resized.flip(-1) if place.hflip else resized
    assert torch.equal(exact, exact.round())
    for backend in ("ref", "triton"):
        found = resize_normalize_pad(images, *arguments, backend=backend)
        assert torch.equal(found.round().double(), exact) and (found - found.round()).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["detr_fast", "reference"])
def test_a_runs_batches_come_in_turns_and_a_step_takes_any(name: str) -> None:
    options = INFERENCE.but(model="detr_tiny", size_mix="mixed")
    workload = build_workload(options) if name == "detr_fast" else build_baseline(name, options)
    padded_sizes: list[tuple[int, ...]] = []
    workload.model.register_forward_pre_hook(lambda _, given: padded_sizes.append(tuple(given[0].shape[2:])))
    assert workload.step is not None
    for _ in range(2):
        workload.run()
    workload.step(observed_batch(options, workload.options.network.config().num_classes))
    assert padded_sizes == [shape.padded_size for shape in batch_shapes(workload.options)] * 2 + [(64, 96)]


def test_baselines_get_the_same_pixels_as_ours() -> None:
    config = OPTIONS.network.config()
    batches = make_batches(OPTIONS, config.num_classes)
    placed = next(plain_feed(batches, config, torch.device("cpu")))
    expected, mask = Preprocessing(config.image_mean, config.image_std, channels_last=True)(batches[0])
    assert torch.equal(placed.images, expected) and mask is not None and torch.equal(placed.mask, mask)
    assert [len(each["labels"]) for each in placed.targets] == batches[0].targets.count.tolist()


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_captured_row_is_compared_as_it_is_replayed(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = StandIn()
    options = OPTIONS.but(mode=mode, model="detr_tiny")
    monkeypatch.setattr("detr_profiling.own_workload.why_not_graphed", lambda _: None)
    monkeypatch.setattr("detr_fast.training.graphed_step.CudaCapturer", lambda *_, **__: capturer)
    monkeypatch.setattr("detr_fast.detector.CudaCapturer", lambda *_, **__: capturer)
    monkeypatch.setattr(Detector, "replays", property(lambda detector: detector.runtime.capture))
    plain, captured = build_workload(options), build_workload(options.but(capture=True))
    assert plain.observe is not None and captured.observe is not None
    before = {name: value.clone() for name, value in captured.model.state_dict().items()}
    expected, found = plain.observe(), captured.observe()
    assert capturer.replayed > 0 and found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in captured.model.state_dict().items())


def test_forms_of_single_operations() -> None:
    workload = build_workload(OPTIONS, {"frozen_batch_norm": "ref", "attention": "ref"})
    selection = workload.model.selection
    chosen = [selection.backend(name, training=True) for name in ("frozen_batch_norm", "attention", "dropout")]  # type: ignore[union-attr, operator]
    assert chosen == ["ref", "ref", "pcg64"]


@pytest.mark.parametrize("size", ["800", "0x64", "64x", "axb", "64 x 64"])
def test_a_size_that_is_none(size: str) -> None:
    with pytest.raises(UserError, match="--size"):
        WorkloadOptions.of(size=size)


def test_what_cannot_be_compared_says_so() -> None:
    with pytest.raises(UserError, match="no counterpart in hf-sdpa"):
        build_baseline("hf-sdpa", OPTIONS.but(model="detr_tiny"))
    with pytest.raises(UserError, match="fasterrcnn resizes"):
        build_baseline("fasterrcnn", OPTIONS.but(size_mix="mixed"))
    with pytest.raises(UserError, match="Did you mean 'reference'"):
        build_baseline("referense", OPTIONS)


def test_auto_is_decided_once() -> None:
    options = WorkloadOptions.of(device="cpu").resolved()
    assert (options.size, options.batch_size, options.height_width) == ("320x427", 1, (320, 427))
    assert options == options.resolved()
    assert WorkloadOptions.of(device="cpu").observed().batch_size == 1
    assert options.but(batch_size=16).observed().batch_size == MOST_OBSERVED


def test_timing() -> None:
    timing = Timing((3.0, 1.0, 2.0, 4.0, 10.0))
    assert (timing.median_ms, timing.q1_ms, timing.q3_ms, timing.runs) == (3, 2, 4, 5)
    assert timing.text() == "3.00 (2.0, 5 runs)"
    assert (timing + Timing((2.0,))).runs == 6
    assert (timing / 4).runs_ms == (0.75, 0.25, 0.5, 1.0, 2.5)


def test_calls_of_a_run_are_issued_back_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    timing = measure(lambda: calls.append("run"), lambda: calls.append("wait"), rounds=2, warmup=1, calls=3)
    assert timing.runs == 2 and calls == ["wait", "run", "run", "run", "wait"] * 3
    clock = PlantedClock()
    monkeypatch.setattr(timing_file, "time", clock)
    slept = measure(lambda: clock.sleep(0.01), lambda: None, rounds=1, warmup=0, calls=4)
    assert slept.median_ms == pytest.approx(10), "of one call"
    assert [calls_a_run("cuda", ms) for ms in (1, 20, 1e3)] == [50, 25, 4] and calls_a_run("cpu", 1) == 1


def test_measure_waits_for_the_device_before_and_after_each_run() -> None:
    calls: list[str] = []
    timing = measure(lambda: calls.append("run"), lambda: calls.append("wait"), rounds=3, warmup=2)
    assert timing.runs == 3 and calls == ["wait", "run", "wait"] * 5
    assert all(a <= b for a, b in pairwise(sorted(timing.runs_ms)))
