"""All operations by name: what `auto`, the ladder, `tune`, the FLOP counter and the tests go through."""

from detr_kernels.attention.backends import OPERATION as ATTENTION
from detr_kernels.convolution.batch_norm import OPERATION as FROZEN_BATCH_NORM
from detr_kernels.convolution.conv_bias_act import OPERATION as CONVOLUTION
from detr_kernels.convolution.depthwise import OPERATION as DEPTHWISE
from detr_kernels.convolution.library import PACKED
from detr_kernels.convolution.stage import OPERATION as RESIDUAL_STAGE
from detr_kernels.dropout.pcg64 import OPERATION as DROPOUT
from detr_kernels.loss.set_loss import OPERATION as SET_LOSS
from detr_kernels.matching.assignment import OPERATION as ASSIGNMENT
from detr_kernels.matching.cost import OPERATION as MATCH_COST
from detr_kernels.normalization.layer_norm import OPERATION as LAYER_NORM
from detr_kernels.preprocessing.resize import OPERATION as PREPROCESSING

OPERATIONS = {
    operation.name: operation
    for operation in (
        PREPROCESSING,
        FROZEN_BATCH_NORM,
        CONVOLUTION,
        RESIDUAL_STAGE,
        PACKED,
        DEPTHWISE,
        ATTENTION,
        DROPOUT,
        LAYER_NORM,
        MATCH_COST,
        ASSIGNMENT,
        SET_LOSS,
    )
}
"""In the order in which an image meets them."""
