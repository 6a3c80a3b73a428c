"""A DETR of all of ResNet-50's layers, so small that its files are; the fixtures `narrow`, `model` and `weights` make
it."""

from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = {
    "hidden_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "feedforward_dim": 64,
    "num_queries": 5,
}
Weights = dict[str, Tensor]

OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}, "w": {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1}]}
"""The part of a checkpoint that is an optimizer's."""
