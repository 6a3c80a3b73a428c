"""A snapshot of what a forward pass in training changes besides gradients, to undo one that failed."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """Return live batch norm's statistics, the only buffers that training changes."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers()]


class ForwardSnapshot:
    """Stores live batch norm's statistics and the random state of the CPU and of `device`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.buffers = [(buffer, buffer.clone()) for buffer in batch_norm_statistics(model)]
        self.device = device
        self.numbers = torch.get_rng_state()
        self.device_numbers = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Restore all of it, and return cached memory to the device."""
        for buffer, before in self.buffers:
            buffer.copy_(before)
        torch.set_rng_state(self.numbers)
        if self.device_numbers is not None:
            torch.cuda.set_rng_state(self.device_numbers, self.device)
            torch.cuda.empty_cache()
