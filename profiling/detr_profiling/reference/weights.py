"""The plain reference with the weights of one of our models, whichever backbone it has; exact, or off by rounding."""

import torch

from detr_fast.config import require
from detr_fast.model.detr import DETR
from detr_fast.weights.naming import to_naming
from detr_profiling.reference.backbones import NUM_BLOCKS
from detr_profiling.reference.detr import ReferenceDETR

HALF_ULP = {"fp32": 2.0**-24, "bf16": 2.0**-9}
"""The largest relative error of rounding to a precision."""
SCATTER_SEEDS = (0, 1)
"""What rounding does to a result is known from more than one: of the weights as they are, and scattered by these."""


def reference_of(model: DETR) -> ReferenceDETR:
    """On the CPU, in float32 and in evaluation mode. Raises UserError for a timm backbone, which it does not have."""
    config = model.config
    require(
        config.backbone in (*NUM_BLOCKS, "tiny"),
        f"The plain reference has no backbone {config.backbone}: compare a model with one of {', '.join(NUM_BLOCKS)}, "
        "or detr_tiny.",
    )
    reference = ReferenceDETR(
        config.backbone,
        config.dilation,
        config.num_classes,
        config.num_queries,
        config.hidden_dim,
        config.num_heads,
        config.encoder_layers,
        config.decoder_layers,
        config.feedforward_dim,
        config.dropout,
        config.source_position,
    )
    reference.load_state_dict(to_naming(model.state_dict(), "facebook"))
    return reference.eval()


def scattered(reference: ReferenceDETR, precision: str, seed: int | None) -> ReferenceDETR:
    """`reference`, each weight multiplied by 1 plus or minus at most what rounding to `precision` may do; None: as it
    is."""
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(1 + HALF_ULP[precision] * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    return reference
