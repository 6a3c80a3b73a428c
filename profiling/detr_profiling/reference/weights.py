"""The plain reference with the weights of one of our models, whichever backbone it has."""

from detr_fast.config import require
from detr_fast.model.detr import DETR
from detr_fast.weights.naming import to_naming
from detr_profiling.reference.backbones import NUM_BLOCKS
from detr_profiling.reference.detr import ReferenceDETR


def reference_of(model: DETR) -> ReferenceDETR:
    """Build it on the CPU, in float32 and in evaluation mode. Raises UserError for a timm backbone,
    and for a decoder that is not DETR's.
    """
    config = model.config
    require(
        config.backbone in (*NUM_BLOCKS, "tiny"),
        f"The plain reference has no backbone {config.backbone}: compare a model with one of {', '.join(NUM_BLOCKS)}, "
        "or detr_tiny.",
    )
    others = config.beyond_detr.keys() - {"source_position"}
    require(not others, f"The plain reference is DETR alone: it has no {', '.join(sorted(others))}.")
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
