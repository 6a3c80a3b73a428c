"""Photographs far larger than what is wanted of them: a JPEG is decoded smaller, and boxes stay on their pixels."""

import json
from pathlib import Path

import pytest
import torch
from detr_kernels import PackedImages, resize_normalize_pad
from PIL import Image

from detr_fast.boxes import cxcywh_to_xyxy
from detr_fast.config import UserError
from detr_fast.data.batch import Sample
from detr_fast.data.coco import CocoDataset
from detr_fast.data.decode import decode_file
from detr_fast.data.transforms import EvaluationTransform, TrainTransform, Transform

HEIGHT, WIDTH = 1201, 1603
BOX = (403, 300, 1199, 905)
"""xyxy, white on black."""


def dataset_of(folder: Path, suffix: str, transform: Transform, width: int = WIDTH) -> CocoDataset:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    image.paste((255, 255, 255), BOX)
    image.save(folder / f"photo{suffix}", quality=95)
    x0, y0, x1, y1 = BOX
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": 1, "iscrowd": 0}
    document = {
        "images": [{"id": 1, "file_name": f"photo{suffix}", "width": width, "height": HEIGHT}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "box"}],
    }
    (folder / "annotations.json").write_text(json.dumps(document))
    return CocoDataset(folder, folder / "annotations.json", transform)


def distance_px(sample: Sample) -> float:
    """Between the box and the white pixels that it should enclose, in what a model sees."""
    packed = PackedImages.from_list([sample.image.permute(1, 2, 0)], [sample.size], [sample.hflip])
    pixels = resize_normalize_pad(packed, *sample.size, (0, 0, 0), (1, 1, 1), backend="ref")[0, 0]
    rows, columns = torch.nonzero(pixels > 0.5, as_tuple=True)
    white = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
    height, width = sample.size
    told = cxcywh_to_xyxy(sample.boxes_cxcywh[0]) * torch.tensor([width, height, width, height])
    return (white - told).abs().max().item()


@pytest.mark.parametrize(("size", "draft_scale"), [(800, 1), (300, 2), (150, 4), (60, 8)])
def test_a_jpeg_is_decoded_smaller_and_its_box_stays(size: int, draft_scale: int, tmp_path: Path) -> None:
    sample = dataset_of(tmp_path, ".jpg", EvaluationTransform(size, 2 * size))[0, 0]
    assert (
        abs(sample.image.shape[1] - HEIGHT / draft_scale) <= 1 and abs(sample.image.shape[2] - WIDTH / draft_scale) <= 1
    )
    assert sample.original_size == (HEIGHT, WIDTH) and min(sample.size) == size
    assert distance_px(sample) <= 1.0


def test_crops_of_it_too(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, ".jpg", TrainTransform((96, 128), 200, (400, 500), (300, 380)))
    samples = [dataset[epoch, 0] for epoch in range(30)]
    assert {sample.hflip for sample in samples} == {False, True}
    assert all(distance_px(sample) <= 1.5 for sample in samples if len(sample.labels))


def test_other_files_are_read_whole(tmp_path: Path) -> None:
    sample = dataset_of(tmp_path, ".png", EvaluationTransform(150, 300))[0, 0]
    assert sample.image.shape == (3, HEIGHT, WIDTH) and distance_px(sample) <= 1.0
    decoded = decode_file(tmp_path / "photo.png", 4)
    assert (decoded.draft_scale, decoded.size) == (1, (HEIGHT, WIDTH))


def test_a_wrong_size_in_the_json_is_seen_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is 1603 x 1201, but the annotations say 1700 x 1201"):
        dataset_of(tmp_path, ".jpg", EvaluationTransform(150, 300), width=1700)[0, 0]
