"""Color jitter: its map against the four steps that it stands for, its range, and all else as without it."""

from dataclasses import replace

import numpy as np
import pytest

from detr_fast.data.color_jitter import BLUE, BRIGHTNESS, CONTRAST, RED, SATURATION, sampled_colors
from detr_fast.data.draws import Draws
from detr_fast.data.transforms import TrainTransform

TRAIN = TrainTransform((48, 64), 96, (50, 60), (38, 60))
IMAGES = 500


def test_the_map_is_channel_gains_saturation_contrast_and_brightness_in_turn() -> None:
    draws, pixels = Draws(3, 1, range(IMAGES)), np.random.default_rng(0).uniform(0, 255, (IMAGES, 3))
    brightness, contrast, saturation = (
        1 + 0.4 * (2 * draws.fraction(number)[:, None] - 1) for number in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    gains = 1 + 0.1 * (2 * np.stack([draws.fraction(number) for number in range(RED, BLUE + 1)], axis=1) - 1)
    scaled = pixels * gains
    luma = scaled @ np.array([[0.299], [0.587], [0.114]])
    saturated = luma + saturation * (scaled - luma)
    expected = brightness * (127.5 + contrast * (saturated - 127.5))
    colors = sampled_colors(0.4, draws)
    found = np.einsum("nij,nj->ni", colors[:, :, :3], pixels) + colors[:, :, 3]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_mid_gray_tells_brightness_and_gains_alone(strength: float) -> None:
    """Maps mid-gray: its brightness spans the whole range, and channels differ by no more than their gains do."""
    colors = sampled_colors(strength, Draws(0, 0, range(IMAGES)))
    assert np.allclose(sampled_colors(0.0, Draws(0, 0, range(9))), np.eye(3, 4))
    luma = (colors @ np.array([127.5, 127.5, 127.5, 1]) / 127.5).mean(1)
    assert 1 - 1.6 * strength < luma.min() < 1 - 0.7 * strength and 1 + 0.7 * strength < luma.max()


def test_everything_else_is_drawn_as_without() -> None:
    """An image's colors depend on seed, epoch and index alone, whatever it is drawn with."""
    sizes = np.random.default_rng(0).integers(30, 300, (IMAGES, 2))
    jittered = replace(TRAIN, color_jitter=0.3)
    plain = list(TRAIN(sizes, Draws(5, 3, range(IMAGES))))
    together = list(jittered(sizes, Draws(5, 3, range(IMAGES))))
    assert plain == [replace(one, color=None) for one in together] and all(one.color for one in together)
    some = np.array([77, 0, 499])
    assert list(jittered(sizes[some], Draws(5, 3, some))) == [together[index] for index in some]
    assert len({one.color for one in [*together, *jittered(sizes, Draws(5, 4, range(IMAGES)))]}) == 2 * IMAGES
