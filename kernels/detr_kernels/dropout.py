"""Random numbers inside kernels: a mask that is drawn where it is used, twice the same, and never stored.

An entry is kept where Philox(seed, index) >= p, with a seed that lies on the device: a captured graph or a compiled
step draws anew at each replay, because torch's own generator makes the seed. (Salmon et al. 2011.)
"""

import torch
from torch import Tensor

from detr_kernels.language import tl, triton


def draw_seed(device: torch.device) -> Tensor:
    """A seed (1,) int64 on `device`, from torch's generator there; nothing is read on the host."""
    return torch.randint(2**62, (1,), device=device)


@triton.jit
def kept(seed, index, p):
    """Which entries survive dropout with probability `p`: bool, as `index` int32 in shape; `seed` is a scalar."""
    return tl.rand(seed, index) >= p
