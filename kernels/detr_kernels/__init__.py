"""Fused kernels for detection transformers: plain-torch references, Triton kernels, and functions that choose."""

import detr_kernels.account  # noqa: F401 -- for what it does: first, since the others import torch
from detr_kernels.assignment import AssignmentBackend, batched_assignment, batched_assignment_ref, choose_assignment
from detr_kernels.attention import AttentionBackend, choose_attention, packed_attention, packed_attention_ref
from detr_kernels.batch_norm import fold_frozen_bn
from detr_kernels.convolution import conv1x1_bias_act, conv1x1_bias_act_ref
from detr_kernels.convolution_library import OneDNNConvolution, why_not_onednn
from detr_kernels.convolution_tail import ConvolutionBackend, choose_convolution, conv_bias_act, conv_bias_act_ref
from detr_kernels.cpu_dropout import apply_dropout, relu_dropout
from detr_kernels.detection_loss import SetLossTerms, set_loss, set_loss_ref
from detr_kernels.dispatch import Backend, choose_backend
from detr_kernels.dropout_attention import attention_with_dropout
from detr_kernels.layer_norm import fused_add_layer_norm, fused_add_layer_norm_ref
from detr_kernels.matching_cost import match_cost, match_cost_ref
from detr_kernels.packing import Blank, Packing
from detr_kernels.pixels import PackedImages, resize_normalize_pad, resize_normalize_pad_ref
from detr_kernels.resnet_stage import residual_stage, residual_stage_ref
from detr_kernels.xformers_attention import why_not_xformers

__all__ = [
    "AssignmentBackend",
    "AttentionBackend",
    "Backend",
    "Blank",
    "ConvolutionBackend",
    "OneDNNConvolution",
    "PackedImages",
    "Packing",
    "SetLossTerms",
    "apply_dropout",
    "attention_with_dropout",
    "batched_assignment",
    "batched_assignment_ref",
    "choose_assignment",
    "choose_attention",
    "choose_backend",
    "choose_convolution",
    "conv1x1_bias_act",
    "conv1x1_bias_act_ref",
    "conv_bias_act",
    "conv_bias_act_ref",
    "fold_frozen_bn",
    "fused_add_layer_norm",
    "fused_add_layer_norm_ref",
    "match_cost",
    "match_cost_ref",
    "packed_attention",
    "packed_attention_ref",
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
