"""The plain reference with the weights of one of our models."""

from detr_fast.config import BEYOND_DETR
from detr_fast.model.detr import DETR
from detr_fast.weights.naming import to_naming
from detr_profiling.reference.detr import ReferenceDETR
from detr_profiling.reference.queries import Choices


def reference_of(model: DETR) -> ReferenceDETR:
    """Build it on the CPU, in float32 and in evaluation mode.

    Weights map by name. Of a model whose norms are folded they are convolutions with biases, and no norm is left: its
    biases have learned what no norm's statistics say.
    """
    config = model.config
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
        Choices(**{name: getattr(config, name) for name in BEYOND_DETR}),
    )
    reference.load_state_dict(to_naming(model.state_dict(), "facebook"))
    return reference.eval()
