"""Color jitter: brightness, contrast, saturation and channel gains of an image, which are one affine map of RGB."""

import numpy as np

from detr_fast.data.draws import NUMBERS_A_STREAM, Draws

BRIGHTNESS, CONTRAST, SATURATION, RED, GREEN, BLUE = range(NUMBERS_A_STREAM, NUMBERS_A_STREAM + 6)
"""Which of an image's random numbers decides what."""
GAIN = 0.25
"""Channels are scaled by this fraction of what brightness is: more would change what color a thing has."""
LUMA = 0.299, 0.587, 0.114
MID_GRAY = 127.5


def sampled_colors(strength: float, draws: Draws) -> np.ndarray:
    """Sample a map of each image's levels 0 to 255, (N, 3, 4) float64: a matrix (3, 3), and what is then added.

    Each factor is uniform in 1 - `strength` to 1 + `strength`, of channels in a fourth of that. In this order: channels
    are scaled, moved away from their luma by the saturation and from mid-gray by the contrast, then all by the
    brightness. The result is for the caller to clamp, once.
    """

    def factors(number: int, reach: float) -> np.ndarray:
        return 1 + reach * (2 * draws.fraction(number)[:, None, None] - 1)

    brightness, contrast, saturation = (factors(number, strength) for number in (BRIGHTNESS, CONTRAST, SATURATION))
    gains = np.concatenate([factors(number, GAIN * strength) for number in (RED, GREEN, BLUE)], axis=2)
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * np.array(LUMA)) * gains
    added = np.broadcast_to(brightness * (1 - contrast) * MID_GRAY, (len(matrix), 3, 1))
    return np.concatenate((matrix, added), axis=2)
