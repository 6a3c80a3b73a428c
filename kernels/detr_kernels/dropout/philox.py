"""Random numbers inside kernels: a mask that is drawn where it is used, twice the same, and never stored.

An entry is kept where Philox(seed, index) >= p, with a seed that lies on the device: a captured graph or a compiled
step draws anew at each replay, because torch's own generator makes the seed. (Salmon et al. 2011.)
"""

import torch
from torch import Tensor

from detr_kernels.triton_compat import tl, triton


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed (1,) int64 on `device`, from torch's generator there; nothing is read on the host."""
    return torch.randint(2**62, (1,), device=device)


@triton.jit
def keep_mask(seed, index, p):
    """Draw dropout's mask, True where an entry survives: bool, as `index` int32 in shape; `seed` is a scalar."""
    return tl.rand(seed, index) >= p


@triton.jit
def keep_mask_tile(seed, first_query, first_key, P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Draw dropout's mask of a tile of attention weights, of probability `P` to 1/65536: bool (BLOCK_Q, BLOCK_K).

    A call of Philox (7 rounds, the fewest that pass every test: Salmon et al. 2011) gives eight numbers of 16 bits.
    They go to keys 8 apart, because a thread holds just those of a GEMM: no number changes hands. A call for
    each weight would make 3.6 times as many instructions of the forward pass's loop.
    """
    query = first_query + tl.arange(0, BLOCK_Q)[:, None]
    eight_keys = first_key // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    a, b, c, d = tl.philox(seed, query, eight_keys, 0, 0, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    numbers = tl.reshape(tl.join(words, words << 16), (BLOCK_Q, BLOCK_K // 64, 8, 8))
    THRESHOLD: tl.constexpr = int(P * 65536) << 16  # what is below the upper 16 bits cannot change the comparison
    return tl.reshape(tl.permute(numbers, (0, 1, 3, 2)), (BLOCK_Q, BLOCK_K)) >= THRESHOLD
