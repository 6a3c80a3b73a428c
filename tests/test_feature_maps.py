"""Tests of feature maps of several strides joined as one."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from detr_fast.config import MODELS, UserError, model_config
from detr_fast.model.backbone import build_backbone
from detr_fast.model.feature_maps import divisible


@pytest.mark.parametrize("size", [(64, 96), (72, 88)])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet50"])
def test_joined_maps_lie_where_they_are_in_the_image(name: str, size: tuple[int, int]) -> None:
    """Each cell has its own map's channels, the fine maps' mean under it and those of the coarse cell over it."""
    alone = [build_backbone(name, strides=(stride,)) for stride in (16, 8, 32)]
    both = build_backbone(name, strides=(16, 8, 32))
    own = both.state_dict()
    for backbone in alone:
        backbone.load_state_dict({key: own[key] for key in backbone.state_dict()})
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = [backbone.eval()(images) for backbone in alone]
        found = both.eval()(images)
    assert found.shape[1] == both.out_channels == sum(each.shape[1] for each in maps)
    height, width = maps[0].shape[-2:]
    assert torch.equal(found[:, : maps[0].shape[1]], maps[0])
    fine, coarse = found[:, maps[0].shape[1] :].split([each.shape[1] for each in maps[1:]], 1)
    for row, column in product(range(height), range(width)):
        under = maps[1][:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
        torch.testing.assert_close(fine[:, :, row, column], under)
        torch.testing.assert_close(coarse[:, :, row, column], maps[2][:, :, row // 2, column // 2])


@pytest.mark.parametrize("strides", [(16, 4), (16, 64)])
def test_maps_that_a_resnet_has_not_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"resnet50 has no feature map of stride {strides[1]}"):
        build_backbone("resnet50", strides=strides)


def test_a_map_is_taken_once() -> None:
    """So that another --token-stride can be asked for of a model that joins that map."""
    config = replace(MODELS["detr_lite"], feature_strides=(8, 32, 32))
    assert config.map_strides == (16, 8, 32)
    assert replace(config, token_stride=8).map_strides == (8, 32)
    assert replace(config, token_stride=None, feature_strides=()).map_strides == ()


@pytest.mark.parametrize("width", [320, 319, 318, 316, 309, 305])
@pytest.mark.parametrize(
    "name", ["detr_r50", "detr_r50_dc5", "detr_lite", "detr_tiny", "tf_efficientnet_lite1", "resnet18"]
)
def test_what_is_left_in_an_image_has_the_same_features_however_wide_it_is(name: str, width: int) -> None:
    """Or boxes that were learned at one size are off at another, as where "same" convolutions pad by the size."""
    config = model_config(name, fold_norms=False)
    backbone = (
        build_backbone(config.backbone, config.dilation, (16,) if config.backbone != "tiny" else ()).double().eval()
    )
    images = torch.randn(1, 3, 64, 640, dtype=torch.float64)
    with torch.no_grad():
        whole, part = (backbone(divisible(images[..., :w], None, config.size_divisible)[0]) for w in (640, width))
    seen = 4  # columns that see nothing of what lies 290 pixels to the right
    torch.testing.assert_close(part[..., :seen], whole[..., :seen])


def test_padding_is_masked_and_none_is_added_where_none_is_needed() -> None:
    images, mask = torch.ones(2, 3, 60, 64), torch.zeros(2, 60, 64, dtype=torch.bool)
    mask[1, :, 40:] = True
    for given in (mask, None):
        more, masked = divisible(images, given, 32)
        assert more.shape == (2, 3, 64, 64) and masked is not None and masked[:, 60:].all()
        assert more[:, :, :60].eq(1).all() and not more[:, :, 60:].any()
        assert torch.equal(masked[:, :60], mask if given is not None else torch.zeros_like(mask))
    for given in (mask, None):
        assert divisible(images, given, 4) == (images, given)
