"""Replayed inference finds what the network itself finds; what captures is CUDA on a GPU, a stand-in here."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detr_fast.config import MODELS
from detr_fast.cuda_graphs import GraphCache
from detr_fast.data.coco import build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.detector import Detector
from detr_fast.evaluation.inference import collect_detections
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.optimized import optimized
from detr_fast.options import DataOptions, RuntimeOptions
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.prediction import Detections
from detr_fast.runtime import Runtime, choose_runtime
from tests.stand_in import StandIn


def make_detectors(most: int = 32) -> tuple[Detector, Detector, StandIn]:
    """An optimised detector, the same with graphs, and what captures them."""
    torch.manual_seed(0)
    plain, capturer = Detector(optimized(DETR(MODELS["detr_tiny"]).eval(), torch.float32)), StandIn()
    graphed = copy.deepcopy(plain)
    graphed.graphs = GraphCache(capturer, most)
    return plain, graphed, capturer


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def require_same(one: Detections, other: Detections) -> None:
    assert one.names == other.names
    assert torch.equal(one.scores, other.scores) and torch.equal(one.boxes_xyxy_px, other.boxes_xyxy_px)


SIZES = [(64, 64), (64, 64), (48, 96), (64, 64), (48, 96), (48, 96), (64, 64)]


def test_the_same_detections_kept_over_later_replays() -> None:
    plain, graphed, capturer = make_detectors()
    images = [photograph(seed, *size) for seed, size in enumerate(SIZES)]
    found = [graphed.predict(image, threshold=0.0)[0] for image in images]
    for image, one in zip(images, found, strict=True):
        require_same(one, plain.predict(image, threshold=0.0)[0])
    assert (capturer.ran, capturer.captured, capturer.replayed) == (2, 2, 5)


def test_outputs_are_not_written_again() -> None:
    _, graphed, _ = make_detectors()
    inputs = [torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        found = [graphed.forward(images, None) for images in inputs]
        for images, outputs in zip(inputs, found, strict=True):
            expected = graphed(images, None)
            assert all(torch.equal(value, expected[name]) for name, value in outputs.items())


def test_a_padded_batch_and_a_full_one_are_two_shapes() -> None:
    plain, graphed, capturer = make_detectors()
    padded = torch.zeros(1, 64, 64, dtype=torch.bool)
    padded[:, :, 40:] = True
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mask in (None, padded, None, padded, ~padded, padded.new_zeros(padded.shape)):
            expected, found = plain(images, mask), graphed.forward(images, mask)
            torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"])
    assert (capturer.captured, capturer.replayed) == (2, 4)


def test_a_data_set_is_evaluated_from_graphs(shapes_root: Path) -> None:
    """Twelve images in batches of five: two full ones, and a last one of two."""
    plain, graphed, capturer = make_detectors()
    dataset = build_dataset(DataOptions(data=str(shapes_root), image_size=64, max_size=64), "val", plain.config)
    rows = []
    for detector in (plain, graphed):
        rows.append(collect_detections(detector, evaluation_loader(dataset, 5, workers=0), None))
    assert np.array_equal(*rows) and len(rows[0]) == 12 * plain.config.num_queries
    assert (capturer.ran, capturer.replayed) == (2, 1)


def test_halves_that_follow_each_other_are_two_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch does not fit, its halves have one shape, and the second is a replay too."""
    plain, graphed, capturer = make_detectors()
    forward = graphed.network.forward

    def bounded(images: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        if len(images) > 1:
            raise torch.OutOfMemoryError("no room")
        return forward(images, mask)

    monkeypatch.setattr(graphed.network, "forward", bounded)
    images = [photograph(seed, 64, 64) for seed in range(4)]
    for _ in range(3):
        for one, other in zip(plain.predict(images, 0.0, 2), graphed.predict(images, 0.0, 2), strict=True):
            torch.testing.assert_close(one.scores, other.scores)
            torch.testing.assert_close(one.boxes_xyxy_px, other.boxes_xyxy_px)
    assert capturer.captured == 1  # not the whole, which would take memory again and again


def test_shapes_past_the_most_run_as_they_are() -> None:
    plain, graphed, capturer = make_detectors(most=1)
    for seed, size in enumerate(SIZES):
        image = photograph(seed, *size)
        require_same(graphed.predict(image, threshold=0.0)[0], plain.predict(image, threshold=0.0)[0])
    assert (capturer.ran, capturer.captured, capturer.replayed) == (1 + 3, 1, 3)


def test_a_large_batch_is_captured_at_its_fourth_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches cost little beside it, and a capture as much as some calls."""
    plain, graphed, capturer = make_detectors()
    monkeypatch.setattr("detr_fast.detector.SMALL_BATCH_PX", 64 * 64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for call in range(1, 6):
            found = graphed.forward(images, None)
            assert torch.equal(found["pred_boxes"], plain(images, None)["pred_boxes"])
            assert (capturer.ran, capturer.captured) == (min(call, 3), int(call >= 4))
        for _ in range(2):
            graphed.forward(images[:1], None)
        assert (capturer.ran, capturer.captured) == (3 + 1, 1 + 1)


def test_shapes_share_the_memory_that_inputs_are_copied_into() -> None:
    _, graphed, _ = make_detectors()
    assert graphed.graphs is not None
    with torch.no_grad():
        for height in (64, 64, 48, 48):
            images = torch.randn(1, 3, height, 64).contiguous(memory_format=torch.channels_last)
            graphed.forward(images, torch.zeros(1, height, 64, dtype=torch.bool))
    one, other = (graph.inputs for graph in graphed.graphs.graphs.values())
    assert one[0].data_ptr() == other[0].data_ptr() and one[0].is_contiguous(memory_format=torch.channels_last)
    assert all(each.data_ptr() % 64 == 0 for each in (*one, *other))


def test_every_library_says_in_its_own_way_that_memory_ran_out() -> None:
    texts = ("CUDA out of memory. Tried", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED when")
    assert all(is_out_of_memory(RuntimeError(text)) for text in texts)
    assert is_out_of_memory(torch.OutOfMemoryError())
    others = (RuntimeError("CUDA error: invalid argument"), ValueError("CUDA out of memory"), None)
    assert not any(map(is_out_of_memory, others))


def test_what_no_longer_holds_is_dropped() -> None:
    _, graphed, _ = make_detectors()
    assert copy.deepcopy(graphed).graphs is None and pickle.loads(pickle.dumps(graphed)).graphs is None
    runtime = choose_runtime(RuntimeOptions(device="cpu", precision="fp32"))
    for change in (lambda: graphed.to(torch.float64), lambda: graphed.optimize(runtime)):
        graphed.graphs = GraphCache(StandIn(), 1)
        change()
        assert graphed.graphs is None


@pytest.mark.parametrize("change", ["memory", "backends"])
def test_a_network_that_was_moved_behind_its_detector_is_captured_anew(change: str) -> None:
    """A replay would read the memory that the weights have left."""
    _, graphed, capturer = make_detectors()
    image = photograph(0, 64, 64)
    for _ in range(2):
        graphed.predict(image)
    if change == "memory":
        graphed.network.to(torch.float64).to(torch.float32)
    else:
        select_backends(graphed.network, "ref", "ref")
    for _ in range(2):
        graphed.predict(image)
    assert (capturer.ran, capturer.captured, capturer.forgotten) == (2, 2, 1)


def test_a_detector_with_graphs_is_freed_without_the_garbage_collector() -> None:
    """Its graphs must not hold it or its network, or their memory would stay for a while."""
    detector, *_ = make_detectors()
    detector.graphs = GraphCache(StandIn(), 1)
    detector.predict(photograph(0, 64, 64))
    references = weakref.ref(detector), weakref.ref(detector.network)
    gc.disable()
    try:
        del detector
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


def test_where_it_replays_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, *_ = make_detectors()
    here = detector.runtime
    there = replace(here, device=torch.device("cuda"))

    def replays(network: DETR, runtime: Runtime) -> bool:
        return Detector(network, runtime=runtime).replays

    assert replays(detector.network, there) and not replays(detector.network, here)
    assert not replays(DETR(detector.config), there)
    for change in ({"compile": True}, {"capture": False}):
        assert not replays(detector.network, replace(there, **change))
    monkeypatch.setattr("detr_fast.detector.CudaCapturer", lambda _: StandIn())
    placed = Detector(detector.network, runtime=there)
    with torch.no_grad():
        placed.forward(torch.zeros(1, 3, 64, 64))
        graphs = placed.graphs
        placed.forward(torch.zeros(1, 3, 64, 64))
    assert graphs is not None and placed.graphs is graphs
