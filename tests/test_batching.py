"""What reaches the model: order, augmentation, padding and errors, the same for any number of workers and ranks."""

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from detr_fast.config import UserError
from detr_fast.data import batching
from detr_fast.data.batching import (
    Batch,
    EpochSampler,
    Sample,
    collate,
    evaluation_loader,
    normalize,
    train_loader,
)
from detr_fast.data.coco import CocoDataset
from detr_fast.data.transforms import EvaluationTransform, TrainTransform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample(height: int, width: int, targets: int = 1, image_id: int = 1) -> Sample:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    boxes = torch.rand(targets, 4, generator=generator)
    return Sample(image, torch.arange(targets), boxes, image_id, (2 * height, 2 * width))


def train_set(root: Path, on_bad_image: str = "error", seed: int = 42) -> CocoDataset:
    transform = TrainTransform((48, 56, 64), 96, (50, 60), (38, 60))
    file = root / "annotations" / "train.json"
    return CocoDataset(root / "train", file, transform, seed=seed, on_bad_image=on_bad_image)


def val_set(root: Path, on_bad_image: str = "error") -> CocoDataset:
    file = root / "annotations" / "val.json"
    return CocoDataset(root / "val", file, EvaluationTransform(64, 64), on_bad_image=on_bad_image)


def first(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def same(a: Batch, b: Batch) -> bool:
    tensors = [
        (x.images, x.sizes, x.targets.labels, x.targets.boxes_cxcywh, x.targets.count, x.original_sizes) for x in (a, b)
    ]
    return a.image_ids == b.image_ids and all(torch.equal(p, q) for p, q in zip(*tensors, strict=True))


def test_collate_pads_right_and_below() -> None:
    samples = [sample(30, 50, targets=2, image_id=8), sample(40, 20, targets=0, image_id=3)]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 40, 50) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.images[0, :, :30, :50], samples[0].image)
    assert torch.equal(batch.images[1, :, :40, :20], samples[1].image)
    assert batch.images[0, :, 30:].sum() == 0 and batch.images[1, :, :, 20:].sum() == 0
    assert batch.sizes.tolist() == [[30, 50], [40, 20]] and batch.padded
    assert batch.image_ids == [8, 3] and batch.original_sizes.tolist() == [[60, 100], [80, 40]]
    assert batch.targets.count.tolist() == [2, 0]


def test_fault_21_a_batch_without_any_target() -> None:
    batch = collate([sample(30, 50, targets=0), sample(30, 50, targets=0)])
    assert batch.targets.labels.shape == (2, 0) and batch.targets.boxes_cxcywh.shape == (2, 0, 4)
    assert not batch.padded


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalize_is_normalising_each_image_and_then_padding(channels_last: bool) -> None:
    samples = [sample(31, 50), sample(40, 20)]
    images, mask = normalize(collate(samples), MEAN, STD, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=layout)
    assert mask is not None and mask.shape == (2, 40, 50)
    for row, row_mask, one in zip(images, mask, samples, strict=True):
        height, width = one.image.shape[1:]
        expected = F.normalize(one.image.float() / 255, list(MEAN), list(STD))
        torch.testing.assert_close(row[:, :height, :width], expected, rtol=0, atol=0)
        assert row[:, height:].abs().sum() == 0 and row[:, :, width:].abs().sum() == 0
        assert not row_mask[:height, :width].any()
        assert row_mask.sum() == 40 * 50 - height * width


def test_normalize_gives_no_mask_where_nothing_is_padded() -> None:
    batch = collate([sample(30, 50), sample(30, 50)])
    assert normalize(batch, MEAN, STD, channels_last=True)[1] is None
    assert batch.images.dtype == torch.uint8  # and the batch is as it was


def test_a_batch_moves_whole() -> None:
    batch = collate([sample(30, 50), sample(40, 20)]).to("meta")
    tensors = (batch.images, batch.sizes, batch.original_sizes, batch.targets.labels, batch.targets.count)
    assert all(tensor.device.type == "meta" for tensor in tensors) and batch.padded


def test_the_dataloader_would_call_our_pin_memory() -> None:
    assert callable(Batch.pin_memory)
    if torch.cuda.is_available():
        batch = collate([sample(30, 50)]).pin_memory()
        assert batch.images.is_pinned() and batch.targets.labels.is_pinned()


@given(length=st.integers(1, 60), batch_size=st.integers(1, 6), world=st.integers(1, 4), seed=st.integers(-3, 2**40))
def test_ranks_partition_each_global_batch(length: int, batch_size: int, world: int, seed: int) -> None:
    if length < batch_size * world:
        with pytest.raises(UserError, match="--batch-size"):
            EpochSampler(length, batch_size, seed, 0, world)
        return
    samplers = [EpochSampler(length, batch_size, seed, rank, world) for rank in range(world)]
    alone = EpochSampler(length, batch_size * world, seed)
    per_epoch = alone.batches_per_epoch
    assert per_epoch == length // (batch_size * world) == samplers[0].batches_per_epoch
    steps = 2 * per_epoch + 1
    seen = []
    for whole, *parts in itertools.islice(zip(alone, *samplers, strict=True), steps):
        assert [position for part in parts for position in part] == whole
        seen += whole
    indices = [index for epoch, index in seen if epoch == 0]
    assert len(indices) == len(set(indices)) == per_epoch * batch_size * world
    assert [epoch for epoch, _ in seen[:: batch_size * world]] == [0] * per_epoch + [1] * per_epoch + [2]


def test_order_depends_on_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = list(itertools.islice(EpochSampler(40, 40, seed), 2))
        return [[index for _, index in batch] for batch in batches]

    assert epochs(1) == epochs(1)
    orders = epochs(1) + epochs(2)
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@given(st.integers(0, 25))
def test_fault_4_a_sampler_started_anywhere_continues(done: int) -> None:
    whole = EpochSampler(23, 2, seed=7, rank=1, world=2)
    per_epoch = whole.batches_per_epoch
    later = EpochSampler(23, 2, 7, 1, 2, start_epoch=done // per_epoch, start_batch=done % per_epoch)
    assert list(itertools.islice(whole, done, done + 12)) == list(itertools.islice(later, 12))


def test_a_start_at_an_epochs_end_is_the_next_epochs_begin() -> None:
    at_end = EpochSampler(10, 2, 7, start_epoch=1, start_batch=5)
    assert next(iter(at_end)) == next(iter(EpochSampler(10, 2, 7, start_epoch=2)))


def test_workers_change_nothing_and_fault_4_a_loader_started_anywhere_continues(shapes_root: Path) -> None:
    dataset = train_set(shapes_root)
    reference = first(train_loader(dataset, 5, workers=0, seed=42), 12)  # 9 batches an epoch
    assert len({tuple(batch.images.shape) for batch in reference}) > 2
    for workers in (1, 3):
        other = first(train_loader(dataset, 5, workers=workers, seed=42), 12)
        assert all(same(a, b) for a, b in zip(reference, other, strict=True)), workers
    resumed = first(train_loader(dataset, 5, workers=1, seed=42, start_epoch=0, start_batch=7), 5)
    assert all(same(a, b) for a, b in zip(reference[7:], resumed, strict=True))


def test_augmentation_differs_by_seed_epoch_and_image_alone(shapes_root: Path) -> None:
    dataset, other_seed = train_set(shapes_root), train_set(shapes_root, seed=43)
    again = dataset[3, 5]
    assert torch.equal(dataset[3, 5].image, again.image)
    assert torch.equal(dataset[3, 5].boxes_cxcywh, again.boxes_cxcywh)
    for other in (dataset, other_seed):
        changes = [other[epoch, 5].image for epoch in range(4, 8)]
        assert any(image.shape != again.image.shape or not torch.equal(image, again.image) for image in changes)
    pairs = [(dataset[0, index].image.shape, other_seed[0, index].image.shape) for index in range(8)]
    assert any(a != b for a, b in pairs)


def test_making_a_loader_leaves_the_global_random_state(shapes_root: Path) -> None:
    before = torch.get_rng_state()
    first(train_loader(train_set(shapes_root), 4, workers=0, seed=1), 2)
    list(evaluation_loader(val_set(shapes_root), 4, workers=0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(shapes_root: Path, workers: int) -> None:
    dataset = val_set(shapes_root)
    batches = list(evaluation_loader(dataset, 5, workers))
    assert [len(batch.image_ids) for batch in batches] == [5, 5, 2]
    assert [id_ for batch in batches for id_ in batch.image_ids] == [record.id for record in dataset.records]


def test_evaluation_ranks_share_the_images(shapes_root: Path) -> None:
    dataset = val_set(shapes_root)
    seen = [
        [id_ for batch in evaluation_loader(dataset, 2, 0, rank=rank, world=5) for id_ in batch.image_ids]
        for rank in range(5)
    ]
    assert sorted(itertools.chain(*seen)) == [record.id for record in dataset.records]
    assert [len(ids) for ids in seen] == [3, 3, 2, 2, 2]


@dataclass
class Broken:
    """A copy of the embedded data set in which some images are cut in half."""

    root: Path
    train: list[int]
    val: list[int]


@pytest.fixture
def broken(shapes_root: Path, tmp_path: Path) -> Broken:
    root = tmp_path / "broken"
    shutil.copytree(shapes_root, root)
    damage = Broken(root, train=[3, 4, 47], val=[0, 1, 7, 11])
    for split, indices in (("train", damage.train), ("val", damage.val)):
        for index in indices:
            path = root / split / f"{index:06d}.jpg"
            path.write_bytes(path.read_bytes()[:500])
    return damage


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_12_and_26_a_bad_image_is_one_clear_error_from_any_process(broken: Broken, workers: int) -> None:
    with pytest.raises(UserError) as train_error:
        first(train_loader(train_set(broken.root), 4, workers, seed=1), 12)
    assert any(f"{index:06d}.jpg" in str(train_error.value) for index in broken.train)
    with pytest.raises(UserError) as val_error:
        list(evaluation_loader(val_set(broken.root), 4, workers))
    for error in (train_error, val_error):
        assert "--on-bad-image skip" in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_fault_12_skipping_in_training_takes_the_next_good_image_and_keeps_count(broken: Broken, workers: int) -> None:
    dataset = train_set(broken.root, on_bad_image="skip")
    batches = first(train_loader(dataset, 4, workers, seed=1), 12)  # one epoch: all 48
    ids = [id_ for batch in batches for id_ in batch.image_ids]
    assert sorted(ids) == sorted([*set(range(48)) - {3, 4, 47}, 5, 5, 0])
    skipped = [Path(path).name for batch in batches for path in batch.skipped]
    assert sorted(skipped) == ["000003.jpg", "000004.jpg", "000004.jpg", "000047.jpg"]


@pytest.mark.parametrize("workers", [0, 2])
def test_fault_12_skipping_in_evaluation_leaves_images_out_and_repeats_none(broken: Broken, workers: int) -> None:
    dataset = val_set(broken.root, on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"000011\.jpg"):  # the last batch has nothing else
        batches = list(evaluation_loader(dataset, 1, workers))
    assert [id_ for batch in batches for id_ in batch.image_ids] == [2, 3, 4, 5, 6, 8, 9, 10]
    skipped = [Path(path).name for batch in batches for path in batch.skipped]
    assert skipped == ["000000.jpg", "000001.jpg", "000007.jpg"]


def test_fault_12_nothing_left_to_take(broken: Broken) -> None:
    for path in (broken.root / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="None of the 48"):
        first(train_loader(train_set(broken.root, on_bad_image="skip"), 2, 0, seed=1), 1)


def test_missing_images_are_bad_images(broken: Broken) -> None:
    (broken.root / "val" / "000000.jpg").unlink()
    assert next(evaluation_loader(val_set(broken.root, "skip"), 3, 0)).skipped[0].endswith("000000.jpg")


def test_fewer_images_than_a_batch(shapes_root: Path) -> None:
    with pytest.raises(UserError, match=r"48 images.*--batch-size"):
        train_loader(train_set(shapes_root), 25, 0, seed=1, world=2)


class Dying(torch.utils.data.Dataset):
    """Ends its process, as the kernel does when memory runs out; or never answers."""

    def __init__(self, hang: bool) -> None:
        self.hang = hang

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> batching.Read:
        import os
        import time

        if self.hang:
            time.sleep(60)
        os._exit(9)


@pytest.mark.parametrize("hang", [False, True])
def test_fault_26_a_worker_that_dies_or_hangs_is_an_error_with_a_hint(
    hang: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "WORKER_TIMEOUT_S", 1)
    loader = batching.make_loader(Dying(hang), workers=1, pin_memory=False, batch_size=1)
    assert isinstance(loader, DataLoader)
    with pytest.raises(UserError, match=r"DataLoader.*/dev/shm"):
        next(batching.batches(loader))


def test_a_dataset_travels_to_a_worker_that_is_not_forked(shapes_root: Path) -> None:
    dataset = pickle.loads(pickle.dumps(train_set(shapes_root)))
    assert torch.equal(dataset[0, 3].image, train_set(shapes_root)[0, 3].image)


def test_ids_reach_the_batch(shapes_root: Path) -> None:
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    batch = next(evaluation_loader(val_set(shapes_root), 12, 0))
    counts = [sum(row["image_id"] == id_ for row in document["annotations"]) for id_ in batch.image_ids]
    assert batch.targets.count.tolist() == counts
