"""Weights, images and targets that any implementation can repeat: made from names, shapes and a salt alone.

Random, but structured so that queries and images differ clearly in the outputs and a missing position or mask shows.
Keys are facebookresearch's.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GAINS = (
    ("bbox_embed", 1.5),
    ("class_embed", 6.0),
    (r"multihead_attn\.out_proj", 8.0),
    (r"multihead_attn\.in_proj", 6.0),
    (r"decoder.*(self_attn\.out_proj|linear2)", 0.05),
    ("out_proj|linear2", 0.3),
    ("in_proj", 3.0),
    ("", 2.0),
)
"""Variance times fan-in of a weight whose key matches: the first row that does."""


def name_seeded_tensor(key: str, shape: torch.Size, salt: int = 0) -> Tensor:
    """Make the float32 value of a parameter or of a batch norm's buffer."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()) + salt))
    if key.endswith("running_var"):
        return noise.abs() * 0.2 + 0.8
    if key.endswith("running_mean"):
        return noise * 0.1
    if ".bn" in key or ".downsample.1." in key or "norm" in key:
        mean = (0.5 if ".bn3." in key else 1.0) if key.endswith("weight") else 0.0
        return noise * 0.05 + mean
    if len(shape) < 2:
        return noise * 0.05
    if key.startswith("query_embed"):
        return noise * 2
    fan_in = math.prod(shape[1:])
    if key.startswith("input_proj"):
        # zero-sum rows drop what all positions share, so that tokens differ as a trained model's do
        return (noise - noise.mean(1, keepdim=True)) * math.sqrt(40 / fan_in)
    gain = next(gain for pattern, gain in GAINS if re.search(pattern, key))
    return noise * math.sqrt(gain / fan_in)


def name_seeded_state_dict(reference: Mapping[str, Tensor], salt: int = 0) -> dict[str, Tensor]:
    """Fill the keys and shapes of `reference` by `name_seeded_tensor`; integer buffers are kept."""
    return {
        key: name_seeded_tensor(key, value.shape, salt) if value.is_floating_point() else value.clone()
        for key, value in reference.items()
    }


def perturbed_state_dict(reference: Mapping[str, Tensor], salt: int = 0) -> dict[str, Tensor]:
    """Replace the vectors of `reference` by name-seeded ones, and matrices of zeros: norms and biases are not 1 and 0.

    Name-seeded matrices sharpen the attention and amplify the backbone's rounding a hundredfold; so these are kept,
    and closeness can be judged tightly.
    """
    seeded = name_seeded_state_dict(reference, salt)
    return {key: value.clone() if value.dim() > 1 and value.any() else seeded[key] for key, value in reference.items()}


def seeded_images(sizes: Sequence[tuple[int, int]], salt: int = 0) -> list[Tensor]:
    """Make normalised images (3, H, W), one per (height, width), smooth enough to give the backbone real structure."""
    images = []
    for index, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(1000 + index + salt)
        coarse = torch.randn(1, 3, height // 16 + 1, width // 16 + 1, generator=generator)
        images.append(F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)[0] * 1.2)
    return images


def seeded_batch(sizes: Sequence[tuple[int, int]], salt: int = 0) -> tuple[Tensor, Tensor]:
    """Pad `seeded_images` with zeros on the right and below (B, 3, H, W); return them and their mask (B, H, W), True
    where padded."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width)
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for row, image in enumerate(seeded_images(sizes, salt)):
        images[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = False
    return images, mask


def seeded_targets(counts: Sequence[int], num_classes: int = 91, salt: int = 0) -> list[dict[str, Tensor]]:
    """Draw for each image `labels` (T,) int64 and `boxes` (T, 4) float32 cxcywh in [0, 1]."""
    targets = []
    for index, count in enumerate(counts):
        generator = torch.Generator().manual_seed(2000 + index + salt)
        labels = torch.randint(1, num_classes, (count,), generator=generator)
        center = torch.rand(count, 2, generator=generator) * 0.6 + 0.2
        size = torch.rand(count, 2, generator=generator) * 0.3 + 0.05
        targets.append({"labels": labels, "boxes": torch.cat([center, size], dim=1)})
    return targets
