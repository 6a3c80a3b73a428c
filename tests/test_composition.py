"""Mosaic, mixup and copy-paste: boxes on their pixels, the same samples from any process, and when they are off."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from detr_fast.boxes import cxcywh_to_xyxy
from detr_fast.config import UserError
from detr_fast.data import coco, composition
from detr_fast.data.batch import Sample
from detr_fast.data.coco import CocoDataset, build_dataset
from detr_fast.data.composition import Composition, Part, composition_of, uncovered
from detr_fast.data.decode import Decoded
from detr_fast.data.draws import Draws
from detr_fast.data.loader import train_loader
from detr_fast.data.transforms import SampledAugmentation, TrainTransform
from detr_fast.options import TrainOptions
from detr_fast.training.build import extremes_of
from tests.test_batching import first, same

TRANSFORM = TrainTransform((96, 128), 200, (90, 120), (60, 110), color_jitter=0.2)
ALL = Composition(0.5, 0.5, 0.5, range(1, 9))
EACH = {
    "mosaic": Composition(1, 0, 0, range(1000)),
    "mixup": Composition(0, 1, 0, range(1000)),
    "copy-paste": Composition(0, 0, 1, range(1000)),
    "all": Composition(1, 1, 1, range(1000)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve black images of all aspects, with up to four objects; one is a single pixel wide."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    sizes = [(1, 300), (300, 2), *rng.integers(40, 300, (10, 2)).tolist()]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for id_, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(root / f"{id_}.png")
        images.append({"id": id_, "file_name": f"{id_}.png", "height": height, "width": width})
        for _ in range(id_ % 5):
            low = rng.integers(0, [width, height])
            size = np.maximum(1, rng.uniform(0.1, 1, 2) * ([width, height] - low)).astype(int)
            row = {"id": len(annotations) + 1, "image_id": id_, "category_id": len(annotations) + 1, "iscrowd": 0}
            annotations.append(row | {"bbox": [*low.tolist(), *size.tolist()], "area": int(size.prod())})
    categories = [{"id": row["id"], "name": str(row["id"])} for row in annotations]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(document))
    return root


def dataset_of(folder: Path, composition: Composition | None, **options: float) -> CocoDataset:
    return CocoDataset(folder, folder / "annotations.json", TRANSFORM, composition=composition, **options)


def painted(
    dataset: CocoDataset, parts: list[Part], own: SampledAugmentation, number: int, label: int | None
) -> Tensor:
    """The sample's levels (h, w) where the object `label` of part `number` is white and all else is black."""
    read: list[Sample] = []
    for index, part in enumerate(parts):
        record = dataset.records[part.image]
        image = torch.zeros(3, record.height, record.width, dtype=torch.uint8)
        for x0, y0, x1, y1 in record.boxes_xyxy_px[record.labels == label].astype(int) if index == number else ():
            image[:, y0:y1, x0:x1] = 255
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coco, "decode_file", lambda *_, image=image: Decoded(image, tuple(image.shape[1:])))
            read.append(dataset.read(part.image, part.augmentation))
    return dataset.joined(parts, read, own).image[0].float()


def brightness(parts: list[Part], number: int) -> float:
    """How bright white of a part is where no opaque part covers it."""
    over = [1 - later.opacity for later in parts[number + 1 :] if later.opacity < 1]
    return 255 * parts[number].opacity * float(np.prod(over))


def edges_of(seen: Tensor) -> list[int]:
    """The corners xyxy of what is True; none where nothing is."""
    rows, columns = torch.nonzero(seen, as_tuple=True)
    if len(rows) == 0:
        return []
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def check_boxes(dataset: CocoDataset, epoch: int, index: int, tolerance_px: float) -> None:
    """Every object by itself, none missing and none too many; each has a label of its own, its image several parts."""
    own = dataset.augmentation(epoch, index)
    parts, sample = dataset.parts(epoch, index, own), dataset[epoch, index]
    if len(parts) == 1:
        return
    assert (sample.size, sample.image.shape[1:], sample.hflip) == (own.size, own.size, False)
    height, width = own.size
    told = (cxcywh_to_xyxy(sample.boxes_cxcywh) * torch.tensor([width, height, width, height])).tolist()
    boxes = list(zip(sample.labels.tolist(), told, strict=True))
    seen = [
        (label, edges)
        for number, part in enumerate(parts)
        for label in dataset.records[part.image].labels.tolist()
        if (edges := edges_of(painted(dataset, parts, own, number, label) > brightness(parts, number) / 2))
    ]
    for those, others in ((boxes, seen), (seen, boxes)):  # what is thinner than two pixels may be too faint to be seen
        for label, box in those:
            if min(box[2] - box[0], box[3] - box[1]) > 2:
                distances = [np.abs(np.subtract(box, other)).max() for name, other in others if name == label]
                assert min(distances, default=np.inf) <= tolerance_px, (label, box, others, parts)


def nearest(sample: Sample) -> Tensor:
    """Resize without blur: a pixel shows what is in its middle."""
    pixels = resize(sample.image, list(sample.size), InterpolationMode.NEAREST_EXACT)
    return pixels.flip(-1) if sample.hflip else pixels


SAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@SAMPLES
@given(kind=st.sampled_from(sorted(EACH)), epoch=st.integers(0, 999), index=st.integers(0, 11))
def test_boxes_are_those_of_the_pixels_that_are_seen(folder: Path, kind: str, epoch: int, index: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "scaled", nearest)
        check_boxes(dataset_of(folder, EACH[kind]), epoch, index, 0.501)


@SAMPLES
@given(kind=st.sampled_from(["mosaic", "mixup"]), epoch=st.integers(0, 999), index=st.integers(0, 11))
def test_they_are_so_too_as_parts_are_really_scaled(folder: Path, kind: str, epoch: int, index: int) -> None:
    """Where a part ends the resize knows nothing beyond: 0.07 more. What a patch leaves may be all blur."""
    check_boxes(dataset_of(folder, EACH[kind]), epoch, index, 0.58)


def test_what_rectangles_leave_of_a_box() -> None:
    box = np.array([10.0, 10, 20, 20])
    for covers, left, fraction in (
        ([], [10, 10, 20, 20], 1),
        ([(0, 0, 9, 30)], [10, 10, 20, 20], 1),
        ([(12, 12, 14, 18)], [10, 10, 20, 20], 0.88),  # a hole
        ([(0, 0, 14, 30)], [14, 10, 20, 20], 0.6),
        ([(0, 0, 14, 15), (5, 15, 16, 40)], [14, 10, 20, 20], 0.5),  # together a side
        ([(0, 0, 30, 15), (0, 12, 30, 30)], [10, 10, 20, 20], 0),
        ([(0, 0, 30, 19.6)], [10, 10, 20, 20], 0),  # too thin to be seen
        ([(0, 10.4, 13, 14)], [10, 10, 20, 20], 0.88),  # of all that it leaves, too thin along the cover alone
    ):
        found = uncovered(box, covers)
        assert (found[0].tolist(), found[1]) == (left, pytest.approx(fraction)), covers


def test_objects_that_are_covered_go_as_those_that_are_cropped(folder: Path) -> None:
    """Asks for a half: none that is covered by more stays, and what remains is as without."""
    every, half = (dataset_of(folder, EACH["copy-paste"], min_visible=least) for least in (0.0, 0.5))
    gone = 0
    for epoch in range(60):
        all_boxes, kept = (each[epoch, 9].boxes_cxcywh.tolist() for each in (every, half))
        assert all(box in all_boxes for box in kept)
        gone += len(all_boxes) - len(kept)
    assert gone > 0
    own = SampledAugmentation((0, 0, 10, 10), (10, 10))
    sample = Sample(torch.zeros(3, 10, 10), torch.tensor([0]), torch.tensor([[0.5, 0.5, 1, 1]]), 0, (10, 10), (10, 10))
    patch = Part(0, replace(own, size=(10, 6)))
    empty = replace(sample, size=(10, 6), labels=torch.zeros(0), boxes_cxcywh=torch.zeros(0, 4))
    for least, count in ((0.4, 1), (0.41, 0)):
        assert len(composition.composed([Part(0, own), patch], [sample, empty], own, least).labels) == count


def test_parts_are_as_frequent_as_asked_and_tiles_fill_the_canvas(folder: Path) -> None:
    dataset, own = (
        dataset_of(folder, Composition(0.2, 0.4, 0.7, range(400))),
        SampledAugmentation((0, 0, 9, 9), (90, 120)),
    )
    counts = np.zeros(3)
    for epoch in range(400):
        parts = dataset.parts(epoch, 9, own)
        assert len(parts) <= Composition(0.2, 0.4, 0.7, range(1)).most_parts == 8
        whole = [part for part in parts if part.opacity == 1]
        tiles = whole[:4] if whole[0].augmentation != own else []
        assert sum(np.prod(tile.augmentation.size) for tile in tiles) in (0, 90 * 120)
        counts += bool(tiles), len(parts) > len(whole), len(whole) > max(1, len(tiles))
    assert counts / 400 == pytest.approx([0.2, 0.4, 0.62], abs=0.06)  # a quarter of the images has nothing to paste
    assert Composition(0, 0.1, 0, range(1)).most_parts == 2


def test_no_random_number_decides_two_things(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, drawn, fraction = dataset_of(folder, EACH["all"]), [], Draws.fraction
    monkeypatch.setattr(Draws, "fraction", lambda self, number: drawn.append(number) or fraction(self, number))
    for epoch in range(9):
        assert len(dataset[epoch, 9].labels) and len(drawn) == len(set(drawn)) > 50
        drawn.clear()


def test_a_sample_is_the_same_from_any_process_and_wherever_the_run_begins(shapes_root: Path) -> None:
    dataset = CocoDataset(
        shapes_root / "train", shapes_root / "annotations" / "train.json", TRANSFORM, seed=7, composition=ALL
    )
    reference = first(train_loader(dataset, 5, workers=0, seed=7), 24)  # 9 batches an epoch
    for workers in (1, 3):
        assert all(map(same, reference, first(train_loader(dataset, 5, workers, seed=7), 24)))
    resumed = first(train_loader(dataset, 5, workers=1, seed=7, start_epoch=1, start_batch=2), 13)
    assert all(map(same, reference[11:], resumed))


def test_without_it_and_in_its_other_epochs_samples_are_as_before(folder: Path) -> None:
    """And in all epochs they have the same sizes, so that batches are arranged as before."""
    plain, dataset = dataset_of(folder, None), dataset_of(folder, replace(EACH["all"], epochs=range(2, 4)))
    for epoch in range(6):
        assert np.array_equal(
            plain.augmentations(epoch, range(12)).sizes, dataset.augmentations(epoch, range(12)).sizes
        )
        for index in range(5, 12):
            before, now = plain[epoch, index], dataset[epoch, index]
            assert (before.image_id, before.original_size, before.color) == (now.image_id, now.original_size, now.color)
            alike = before.image.shape == now.image.shape and torch.equal(before.boxes_cxcywh, now.boxes_cxcywh)
            assert alike == (epoch not in (2, 3))


def broken(shapes_root: Path, root: Path, composition: Composition, on_bad_image: Any) -> CocoDataset:
    """The embedded data set with three images that cannot be read."""
    shutil.copytree(shapes_root / "train", root / "train")
    for index in (3, 4, 47):
        (root / "train" / f"{index:06d}.jpg").write_bytes(b"")
    file = shapes_root / "annotations" / "train.json"
    return CocoDataset(root / "train", file, TRANSFORM, composition=composition, on_bad_image=on_bad_image)


@pytest.mark.parametrize("kind", EACH)
def test_fault_12_the_next_image_stands_in_for_a_part_that_cannot_be_read(
    kind: str, shapes_root: Path, tmp_path: Path
) -> None:
    dataset = broken(shapes_root, tmp_path, EACH[kind], "skip")
    whole = CocoDataset(
        shapes_root / "train", shapes_root / "annotations" / "train.json", TRANSFORM, composition=EACH[kind]
    )
    batches = first(train_loader(dataset, 1, 0, seed=1), 48)
    ids = [id_ for batch in batches for id_ in batch.image_ids]
    assert sorted(ids) == sorted([*set(range(48)) - {3, 4, 47}, 5, 5, 0])
    again = next(batch for batch in batches if batch.skipped and batch.image_ids[0] not in (5, 0))  # a partner's fault
    index = again.image_ids[0]
    parts = whole.parts(0, index, whole.augmentation(0, index))
    bad = {part.image for part in parts} & {3, 4, 47}
    assert bad and bad <= {int(Path(path).stem) for path in again.skipped}
    now = dataset.parts(0, index, dataset.augmentation(0, index), {3, 4, 47})
    assert [part.corner for part in now][: len(parts)] == [part.corner for part in parts] or kind != "mosaic"
    assert [one.image if one.image not in bad else {3: 5, 4: 5, 47: 0}[one.image] for one in parts] == [
        one.image for one in now
    ]


def test_fault_12_a_part_that_cannot_be_read_is_named(shapes_root: Path, tmp_path: Path) -> None:
    dataset = broken(shapes_root, tmp_path, EACH["mosaic"], "error")
    index = next(
        index
        for index in range(5, 47)
        if {3, 4, 47} & {part.image for part in dataset.parts(0, index, dataset.augmentation(0, index))}
    )
    with pytest.raises(UserError, match=r"0000(03|04|47)\.jpg"):
        dataset[0, index]
    with pytest.raises(UserError, match=r"0000(03|04|47)\.jpg.*--on-bad-image skip"):
        first(train_loader(dataset, 1, 0, seed=1), 48)


def test_options_say_when_it_is_on(shapes_root: Path) -> None:
    """Without --compose-epochs the schedule's first twentieth and last fifth are left alone; --minutes have none."""
    options = TrainOptions.of(data=str(shapes_root), mosaic=0.5, copy_paste=0.2, epochs=40)
    train = build_dataset(options, "train")
    assert train.composition == Composition(0.5, 0, 0.2, range(2, 32))
    assert (
        build_dataset(options, "val").composition is None
        and composition_of(options.but(mosaic=0, copy_paste=0)) is None
    )
    assert composition_of(options.but(minutes=3, compose_epochs=(1, 20))) == Composition(0.5, 0, 0.2, range(1, 20))
    for wrong in ({"minutes": 3}, {"compose_epochs": (3, 3)}, {"compose_epochs": (-1, 3)}, {"minutes": 3, "mosaic": 0}):
        with pytest.raises(UserError, match="--compose-epochs"):
            options.but(**wrong)
    most = max(len(record.labels) for record in train.records)
    assert extremes_of(options, train, 256).objects == 7 * most
