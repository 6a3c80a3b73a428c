"""What a network is given: each image normalised and padded, and a mask of the padding."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from detr_fast.config import MODELS
from detr_fast.data.batch import Sample, collate
from detr_fast.detector import place
from detr_fast.model.detr import DETR
from detr_fast.options import RuntimeOptions
from detr_fast.preprocessing import Preprocessing
from detr_fast.runtime import choose_runtime

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample(height: int, width: int) -> Sample:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    no_labels, no_boxes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
    return Sample(image, no_labels, no_boxes, 1, (height, width), (height, width))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_models_input_is_each_image_normalised_and_then_padded(channels_last: bool) -> None:
    samples = [sample(31, 50), sample(40, 20)]
    images, mask = Preprocessing(MEAN, STD, channels_last)(collate(samples))
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


def test_no_mask_where_nothing_is_padded() -> None:
    same_size = [sample(30, 50), sample(30, 50)]
    assert Preprocessing(MEAN, STD)(collate(same_size))[1] is None
    wider = Preprocessing(MEAN, STD)(collate(same_size, (32, 64)))[1]
    assert wider is not None and wider.shape == (2, 32, 64) and wider.sum() == 2 * (32 * 64 - 30 * 50)


def test_it_is_as_the_network_and_its_runtime_say() -> None:
    runtime = choose_runtime(RuntimeOptions(device="cpu", precision="bf16", channels_last=False, kernels="ref"))
    preprocessing = Preprocessing.of(place(DETR(MODELS["detr_tiny"]), runtime), runtime)
    assert preprocessing == Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), False, torch.bfloat16, "ref")
    images, _ = preprocessing(collate([sample(30, 50)]))
    assert images.dtype == torch.bfloat16 and images.is_contiguous()
