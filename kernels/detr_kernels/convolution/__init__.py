"""Convolution with frozen batch norm, bias, residual and ReLU, one at a time or a whole ResNet stage."""
