"""Fused operations for detection transformers: plain-torch references, Triton kernels, and a registry that chooses."""

import detr_kernels.account  # noqa: F401 -- for what it does: first, since the others import torch
from detr_kernels.attention.backends import ROWS as ROW_BACKENDS
from detr_kernels.attention.packed import packed_attention, packed_attention_ref
from detr_kernels.attention.packing import Packing, ZeroRows
from detr_kernels.attention.padded import attention_ref, padded_attention
from detr_kernels.attention.xformers import why_not_xformers
from detr_kernels.convolution.batch_norm import fold_frozen_bn
from detr_kernels.convolution.conv_bias_act import conv_bias_act, conv_bias_act_ref
from detr_kernels.convolution.depthwise import depthwise_conv, depthwise_conv_ref
from detr_kernels.convolution.library import OneDNNConvolution, why_not_onednn
from detr_kernels.convolution.pointwise import conv1x1_bias_act, conv1x1_bias_act_ref
from detr_kernels.convolution.stage import residual_stage, residual_stage_ref
from detr_kernels.dropout.pcg64 import apply_dropout, relu_dropout
from detr_kernels.loss.set_loss import SetLossTerms, set_loss, set_loss_ref
from detr_kernels.matching.assignment import batched_assignment, batched_assignment_ref
from detr_kernels.matching.cost import match_cost, match_cost_ref
from detr_kernels.normalization.layer_norm import fused_add_layer_norm, fused_add_layer_norm_ref
from detr_kernels.operations import OPERATIONS
from detr_kernels.preprocessing.resize import PackedImages, resize_normalize_pad, resize_normalize_pad_ref
from detr_kernels.registry import Backend, Choice, Facts, Operation, Selection

__all__ = [
    "OPERATIONS",
    "ROW_BACKENDS",
    "Backend",
    "Choice",
    "Facts",
    "OneDNNConvolution",
    "Operation",
    "PackedImages",
    "Packing",
    "Selection",
    "SetLossTerms",
    "ZeroRows",
    "apply_dropout",
    "attention_ref",
    "batched_assignment",
    "batched_assignment_ref",
    "conv1x1_bias_act",
    "conv1x1_bias_act_ref",
    "conv_bias_act",
    "conv_bias_act_ref",
    "depthwise_conv",
    "depthwise_conv_ref",
    "fold_frozen_bn",
    "fused_add_layer_norm",
    "fused_add_layer_norm_ref",
    "match_cost",
    "match_cost_ref",
    "packed_attention",
    "packed_attention_ref",
    "padded_attention",
    "relu_dropout",
    "residual_stage",
    "residual_stage_ref",
    "resize_normalize_pad",
    "resize_normalize_pad_ref",
    "set_loss",
    "set_loss_ref",
    "why_not_onednn",
    "why_not_xformers",
]
