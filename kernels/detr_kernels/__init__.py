"""Fused kernels for detection transformers: plain-torch references, Triton kernels, and functions that choose."""

from detr_kernels.layer_norm import fused_add_layer_norm, fused_add_layer_norm_ref

__all__ = ["fused_add_layer_norm", "fused_add_layer_norm_ref"]
