"""What reaches the model: order, augmentation, padding and errors, the same for any number of workers and ranks."""

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from detr_fast.config import UserError
from detr_fast.data import loader as data_loader
from detr_fast.data.batch import Batch, Sample, collate
from detr_fast.data.buckets import shape_batches
from detr_fast.data.coco import CocoDataset
from detr_fast.data.loader import evaluation_loader, train_loader
from detr_fast.data.transforms import EvaluationTransform, TrainTransform


def sample(height: int, width: int, targets: int = 1, image_id: int = 1) -> Sample:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    boxes = torch.rand(targets, 4, generator=generator)
    return Sample(image, torch.arange(targets), boxes, image_id, (2 * height, 2 * width), (height, width))


def train_set(root: Path, on_bad_image: str = "error", seed: int = 42) -> CocoDataset:
    transform = TrainTransform((48, 56, 64), 96, (50, 60), (38, 60), color_jitter=0.3)
    file = root / "annotations" / "train.json"
    return CocoDataset(root / "train", file, transform, seed=seed, on_bad_image=on_bad_image)


def val_set(root: Path, on_bad_image: str = "error") -> CocoDataset:
    file = root / "annotations" / "val.json"
    return CocoDataset(root / "val", file, EvaluationTransform(64, 64), on_bad_image=on_bad_image)


def first(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def same(a: Batch, b: Batch) -> bool:
    tensors = [list(x.tensors()) for x in (a, b)]
    alike = (a.image_ids, a.padded_size, a.images.slots) == (b.image_ids, b.padded_size, b.images.slots)
    return alike and all(torch.equal(p, q) for p, q in zip(*tensors, strict=True))


def test_collate_keeps_images_as_they_are_and_makes_room_for_the_largest() -> None:
    samples = [sample(30, 50, targets=2, image_id=8), sample(40, 20, targets=0, image_id=3)]
    batch = collate(samples)
    for image, one in zip(batch.images, samples, strict=True):
        assert torch.equal(image, one.image.permute(1, 2, 0))
    assert batch.images.sizes == [(30, 50), (40, 20)] and batch.padded_size == (40, 50) and batch.padded
    assert batch.padding_overhead == pytest.approx(2 * 40 * 50 / (30 * 50 + 40 * 20) - 1)
    assert collate(samples, (33, 64)).padded_size == (40, 64)
    assert batch.image_ids == [8, 3] and batch.original_sizes.tolist() == [[60, 100], [80, 40]]
    assert batch.targets.count.tolist() == [2, 0]


def test_fault_21_a_batch_without_any_target() -> None:
    batch = collate([sample(30, 50, targets=0), sample(30, 50, targets=0)])
    assert batch.targets.labels.shape == (2, 0) and batch.targets.boxes_cxcywh.shape == (2, 0, 4)
    assert not batch.padded


def test_of_a_batch_from_a_worker_the_pixels_alone_are_shared_memory() -> None:
    """Each tensor costs a connection to the worker: 0.4 ms in the process that launches steps."""
    recolored = replace(sample(30, 50, targets=0), color=(0.5,) * 12)
    for samples in ([sample(30, 50, targets=3), sample(40, 20, targets=0)], [recolored]):
        batch = replace(collate(samples, (48, 64)), skipped=("a.jpg",))
        again = pickle.loads(pickle.dumps(batch))
        assert same(batch, again) and again.skipped == ("a.jpg",) and again.images.sizes == batch.images.sizes
        assert all(one.dtype == other.dtype for one, other in zip(batch.tensors(), again.tensors(), strict=True))
        assert [part for part in tree_leaves(batch.__reduce__()[1]) if isinstance(part, torch.Tensor)] == [
            batch.images.buffer
        ]


def test_a_batch_moves_whole() -> None:
    batch = collate([replace(sample(30, 50), color=(0.5,) * 12), replace(sample(40, 20), color=(1.0,) * 12)])
    moved, half = batch.to("meta"), batch.split(2)[1]
    assert len(list(moved.tensors())) == 7 and moved.padded
    assert all(tensor.device.type == "meta" for tensor in moved.tensors())
    assert half.images.colors is not None and half.images.colors.tolist() == [[[1.0] * 4] * 3]


def test_the_dataloader_would_call_our_pin_memory() -> None:
    assert callable(Batch.pin_memory)
    if torch.cuda.is_available():
        batch = collate([sample(30, 50)]).pin_memory()
        assert batch.images.buffer.is_pinned() and batch.images.table.is_pinned() and batch.targets.labels.is_pinned()


def test_workers_change_nothing_and_fault_4_a_loader_started_anywhere_continues(shapes_root: Path) -> None:
    dataset = train_set(shapes_root)
    reference = first(train_loader(dataset, 5, workers=0, seed=42), 12)  # 9 batches an epoch
    assert len({batch.padded_size for batch in reference}) > 2
    assert all(batch.images.colors is not None and len(batch.images.colors) == 5 for batch in reference)
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
    assert again.size == dataset.augmentation(3, 5).size


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
    assert [len(ids) for ids in seen] == [4, 2, 2, 2, 2]  # six batches


def of_sizes(folder: Path, sizes: list[tuple[int, int]]) -> CocoDataset:
    """Images of (h, w) with one object each; evaluated with the shorter side 32, at most 64."""
    names = [f"{number:02d}.png" for number in range(len(sizes))]
    for name, (height, width) in zip(names, sizes, strict=True):
        Image.new("RGB", (width, height), (90, 90, 90)).save(folder / name)
    document = {
        "images": [
            {"id": number + 1, "file_name": name, "height": height, "width": width}
            for number, (name, (height, width)) in enumerate(zip(names, sizes, strict=True))
        ],
        "annotations": [
            {"id": id_, "image_id": id_, "category_id": 1, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0}
            for id_ in range(1, len(sizes) + 1)
        ],
        "categories": [{"id": 1, "name": "box"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return CocoDataset(folder, folder / "annotations.json", EvaluationTransform(32, 64))


WIDE, TALL, SQUARE = (24, 36), (36, 24), (30, 30)


def test_shapes_that_most_batches_have_come_first_and_then_the_larger() -> None:
    sizes = np.array([(8, 12), *[(8, 8)] * 4, *[(12, 8)] * 2, (8, 13)])
    assert list(itertools.chain(*shape_batches(sizes, 1))) == [1, 2, 3, 4, 5, 6, 7, 0]
    assert shape_batches(sizes[:0], 2) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_by_shape(tmp_path: Path, workers: int) -> None:
    """The shape that most batches have first, then the larger; every image once, whatever the number of ranks."""
    dataset = of_sizes(tmp_path, [WIDE, SQUARE, TALL, WIDE, WIDE, SQUARE, WIDE, WIDE, TALL])
    alone = list(evaluation_loader(dataset, 2, workers))
    assert [batch.image_ids for batch in alone] == [[1, 4], [5, 7], [8, 2], [6, 3], [9]]
    assert [batch.padded_size for batch in alone] == [(32, 48)] * 3 + [(48, 32)] * 2
    assert [batch.padded for batch in alone] == [False, False, True, True, False]
    parts = [list(evaluation_loader(dataset, 2, workers, rank=rank, world=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert list(evaluation_loader(dataset, 2, workers, rank=5, world=6)) == []  # more ranks than batches
    together = [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch]
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


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

    def __getitem__(self, index: int) -> data_loader.Read:
        import os
        import time

        if self.hang:
            time.sleep(60)
        os._exit(9)


@pytest.mark.parametrize("hang", [False, True])
def test_fault_26_a_worker_that_dies_or_hangs_is_an_error_with_a_hint(
    hang: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_loader, "WORKER_TIMEOUT_S", 1)
    loader = data_loader.make_loader(Dying(hang), workers=1, pin_memory=False, batch_size=1)
    assert isinstance(loader, DataLoader)
    with pytest.raises(UserError, match=r"DataLoader.*/dev/shm"):
        next(data_loader.batches(loader))


def test_a_dataset_travels_to_a_worker_that_is_not_forked(shapes_root: Path) -> None:
    dataset = pickle.loads(pickle.dumps(train_set(shapes_root)))
    assert torch.equal(dataset[0, 3].image, train_set(shapes_root)[0, 3].image)


def test_ids_reach_the_batch(shapes_root: Path) -> None:
    document = json.loads((shapes_root / "annotations" / "val.json").read_text())
    batch = next(evaluation_loader(val_set(shapes_root), 12, 0))
    counts = [sum(row["image_id"] == id_ for row in document["annotations"]) for id_ in batch.image_ids]
    assert batch.targets.count.tolist() == counts
