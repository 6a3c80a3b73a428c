"""Fused kernels for detection transformers; knows nothing of DETR's configuration."""
