"""What an image is batched with changes its result as much as it does in the reference: padding meets the convolutions,
whose zeros at the border then lie elsewhere. Nothing else of a neighbour reaches it."""

import pytest
import torch
from detr_profiling.reference.detr import ReferenceDETR
from detr_profiling.reference.name_seeded_weights import perturbed_state_dict
from torch import Tensor, nn

from detr_fast import build_model, export_state_dict, load_state_dict
from detr_fast.model.backends import select_backends

LAYERS = {"encoder_layers": 1, "decoder_layers": 2}
PADDED_SIZES = [(96, 128), (128, 192)]
"""An image of 96x128 alone, and in a bucket's larger batch."""


def padded(image: Tensor, padded_size: tuple[int, int], neighbour: float) -> tuple[Tensor, Tensor]:
    """The image and another of the batch's size, of one gray."""
    images, mask = image.new_zeros(2, 3, *padded_size), torch.ones(2, *padded_size, dtype=torch.bool)
    images[0, :, : image.shape[1], : image.shape[2]] = image
    mask[0, : image.shape[1], : image.shape[2]] = False
    images[1], mask[1] = neighbour, False
    return images, mask


@torch.no_grad()
def logits(model: nn.Module, image: Tensor, padded_size: tuple[int, int], neighbour: float = 0.0) -> Tensor:
    return model(*padded(image, padded_size, neighbour))["pred_logits"][0].double()


@pytest.mark.parametrize("kernels", ["ref", "auto"])
def test_padding_does_what_it_does_in_the_reference(kernels: str) -> None:
    torch.manual_seed(3)
    ours = build_model("detr_r50", num_queries=8, dropout=0.0, **LAYERS)
    weights = perturbed_state_dict(export_state_dict(ours, "facebook"), 7)
    load_state_dict(ours, weights)
    reference = ReferenceDETR(num_queries=8, dropout=0.0, **LAYERS)
    reference.load_state_dict(weights)
    ours, reference = ours.double().eval(), reference.double().eval()
    select_backends(ours, kernels, dtype=torch.float64)
    image = torch.randn(3, *PADDED_SIZES[0], dtype=torch.float64)
    alone, together = (logits(ours, image, room) for room in PADDED_SIZES)
    effect = logits(reference, image, PADDED_SIZES[1]) - logits(reference, image, PADDED_SIZES[0])
    assert effect.abs().max() > 1e-4  # there is one
    torch.testing.assert_close(together - alone, effect, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(ours, image, PADDED_SIZES[1], neighbour=3.0), together, rtol=0, atol=1e-6)
