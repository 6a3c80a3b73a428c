"""Makes the network's input of decoded images of any size, on the device: resizes, flips, normalises and pads."""

from dataclasses import dataclass
from typing import Self

import torch
from detr_kernels import resize_normalize_pad
from torch import Tensor

from detr_fast.data.batch import Batch
from detr_fast.model.detr import DETR
from detr_fast.runtime import Runtime


@dataclass(frozen=True)
class Preprocessing:
    """Makes a network's input from a batch: normalised as it expects, in one memory order, dtype and backend."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    backend: str = "ref"

    @classmethod
    def of(cls, network: DETR, runtime: Runtime) -> Self:
        """Take mean and standard deviation from the network's configuration, the rest from how it runs."""
        config = network.config
        return cls(
            config.image_mean,
            config.image_std,
            runtime.channels_last,
            runtime.dtype,
            network.backend("preprocessing"),
        )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Compute `(x / 255 - mean) / std` of each image, (B, 3, H, W), 0 where padded, and the padding mask.

        The mask (B, H, W) is True where padded; None where no image is. Runs on the batch's device and reads nothing
        from it.
        """
        height, width = batch.padded_size
        computed = torch.float32 if self.dtype == torch.float64 else self.dtype
        images = resize_normalize_pad(batch.images, height, width, self.mean, self.std, computed, self.backend)
        images = images.to(self.dtype)
        if not self.channels_last:
            images = images.contiguous()
        if not batch.padded:
            return images, None
        own_height, own_width = batch.images.table[:, 3:5, None].unbind(1)  # (B, 1) each
        rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
        return images, (rows >= own_height)[:, :, None] | (columns >= own_width)[:, None, :]
