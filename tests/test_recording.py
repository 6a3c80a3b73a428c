"""Recorded inference finds what the model itself finds; what records is CUDA's on a GPU, a stand-in here."""

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

from detr_fast.config import MODELS, DataOptions
from detr_fast.data.coco import build_dataset
from detr_fast.data.loader import evaluation_loader
from detr_fast.evaluation.inference import collect_detections, forward_of, replayed
from detr_fast.evaluation.prediction import Detections, predict, runtime_of
from detr_fast.model.backends import select_backends
from detr_fast.model.detr import DETR
from detr_fast.model.freezing import frozen
from detr_fast.out_of_memory import is_out_of_memory
from detr_fast.recording import Recordings
from tests.stand_in import StandIn


def make_model(most: int = 32) -> tuple[DETR, DETR, StandIn]:
    """A frozen model, the same recorded, and what records it."""
    torch.manual_seed(0)
    plain, recorder = frozen(DETR(MODELS["detr_tiny"]).eval(), torch.float32), StandIn()
    recorded = copy.deepcopy(plain)
    recorded.recordings = Recordings(recorder, most)
    return plain, recorded, recorder


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def require_same(one: Detections, other: Detections) -> None:
    assert one.names == other.names
    assert torch.equal(one.scores, other.scores) and torch.equal(one.boxes_xyxy_px, other.boxes_xyxy_px)


SIZES = [(64, 64), (64, 64), (48, 96), (64, 64), (48, 96), (48, 96), (64, 64)]


def test_the_same_detections_kept_over_later_replays() -> None:
    plain, recorded, recorder = make_model()
    images = [photograph(seed, *size) for seed, size in enumerate(SIZES)]
    found = [recorded.predict(image, threshold=0.0)[0] for image in images]
    for image, one in zip(images, found, strict=True):
        require_same(one, plain.predict(image, threshold=0.0)[0])
    assert (recorder.ran, recorder.recorded, recorder.replayed) == (2, 2, 5)


def test_outputs_are_not_written_again() -> None:
    _, recorded, _ = make_model()
    inputs = [torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        found = [replayed(recorded, images, None) for images in inputs]
        for images, outputs in zip(inputs, found, strict=True):
            expected = recorded(images, None)
            assert all(torch.equal(value, expected[name]) for name, value in outputs.items())


def test_a_padded_batch_and_a_full_one_are_two_shapes() -> None:
    plain, recorded, recorder = make_model()
    padded = torch.zeros(1, 64, 64, dtype=torch.bool)
    padded[:, :, 40:] = True
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mask in (None, padded, None, padded, ~padded, padded.new_zeros(padded.shape)):
            expected, found = plain(images, mask), replayed(recorded, images, mask)
            torch.testing.assert_close(found["pred_boxes"], expected["pred_boxes"])
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def test_a_data_set_is_evaluated_from_recordings(shapes_root: Path) -> None:
    """Twelve images in batches of five: two full ones, and a last one of two."""
    plain, recorded, recorder = make_model()
    dataset = build_dataset(DataOptions(data=str(shapes_root), image_size=64, max_size=64), "val", plain.config)
    rows = []
    for model in (plain, recorded):
        loader = evaluation_loader(dataset, 5, workers=0)
        rows.append(collect_detections(model, loader, runtime_of(model), None))
    assert np.array_equal(*rows) and len(rows[0]) == 12 * plain.config.num_queries
    assert (recorder.ran, recorder.replayed) == (2, 1)


def test_halves_that_follow_each_other_are_two_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch does not fit, its halves have one shape, and the second is a replay too."""
    plain, recorded, recorder = make_model()
    forward = recorded.forward

    def bounded(images: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        if len(images) > 1:
            raise torch.OutOfMemoryError("no room")
        return forward(images, mask)

    monkeypatch.setattr(recorded, "forward", bounded)
    images = [photograph(seed, 64, 64) for seed in range(4)]
    for _ in range(3):
        for one, other in zip(predict(plain, images, 0.0, 2), predict(recorded, images, 0.0, 2), strict=True):
            torch.testing.assert_close(one.scores, other.scores)
            torch.testing.assert_close(one.boxes_xyxy_px, other.boxes_xyxy_px)
    assert recorder.recorded == 1  # not the whole, which would take memory again and again


def test_shapes_past_the_most_run_as_they_are() -> None:
    plain, recorded, recorder = make_model(most=1)
    for seed, size in enumerate(SIZES):
        image = photograph(seed, *size)
        require_same(recorded.predict(image, threshold=0.0)[0], plain.predict(image, threshold=0.0)[0])
    assert (recorder.ran, recorder.recorded, recorder.replayed) == (1 + 3, 1, 3)


def test_a_large_batch_is_captured_at_its_fourth_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches cost little beside it, and a capture as much as some calls."""
    plain, recorded, recorder = make_model()
    monkeypatch.setattr("detr_fast.evaluation.inference.SMALL_BATCH_PX", 64 * 64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for call in range(1, 6):
            found = replayed(recorded, images, None)
            assert torch.equal(found["pred_boxes"], plain(images, None)["pred_boxes"])
            assert (recorder.ran, recorder.recorded) == (min(call, 3), int(call >= 4))
        for _ in range(2):
            replayed(recorded, images[:1], None)
        assert (recorder.ran, recorder.recorded) == (3 + 1, 1 + 1)


def test_shapes_share_the_memory_that_inputs_are_copied_into() -> None:
    _, recorded, _ = make_model()
    assert recorded.recordings is not None
    with torch.no_grad():
        for height in (64, 64, 48, 48):
            images = torch.randn(1, 3, height, 64).contiguous(memory_format=torch.channels_last)
            replayed(recorded, images, torch.zeros(1, height, 64, dtype=torch.bool))
    one, other = (recording.inputs for recording in recorded.recordings.made.values())
    assert one[0].data_ptr() == other[0].data_ptr() and one[0].is_contiguous(memory_format=torch.channels_last)
    assert all(each.data_ptr() % 64 == 0 for each in (*one, *other))


def test_every_library_says_in_its_own_way_that_memory_ran_out() -> None:
    texts = ("CUDA out of memory. Tried", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED when")
    assert all(is_out_of_memory(RuntimeError(text)) for text in texts)
    assert is_out_of_memory(torch.OutOfMemoryError())
    others = (RuntimeError("CUDA error: invalid argument"), ValueError("CUDA out of memory"), None)
    assert not any(map(is_out_of_memory, others))


def test_what_no_longer_holds_is_dropped() -> None:
    _, recorded, _ = make_model()
    assert copy.deepcopy(recorded).recordings is None and pickle.loads(pickle.dumps(recorded)).recordings is None
    for change in (lambda: recorded.to(torch.float64), lambda: select_backends(recorded)):
        recorded.recordings = Recordings(StandIn(), 1)
        change()
        assert recorded.recordings is None


def test_a_recorded_model_is_freed_without_the_garbage_collector() -> None:
    """Its recordings must not hold it, or its memory would stay for a while."""
    model, *_ = make_model()
    model.recordings = Recordings(StandIn(), 1)
    model.predict(photograph(0, 64, 64))
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_where_it_is_recorded_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_fast.evaluation.inference.CudaRecorder", lambda _: StandIn())
    model, *_ = make_model()
    here = runtime_of(model)
    there = replace(here, device=torch.device("cuda"))
    trainable = DETR(model.config)
    for one, runtime in ((model, here), (trainable, there)):
        assert forward_of(one, runtime) is one and one.recordings is None
    assert forward_of(model, replace(there, compile=True)) is not model and model.recordings is None
    forward_of(model, there)
    recordings = model.recordings
    assert recordings is not None
    forward_of(model, there)
    assert model.recordings is recordings
