"""Tests of feature maps of several strides joined as one."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from detr_fast.config import MODELS, UserError
from detr_fast.model.backbone import build_backbone


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
