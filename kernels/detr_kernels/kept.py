"""Constants that are computed once for all later calls, and when that is allowed."""

import torch
from torch import Tensor, nn


def may_be_kept(*tensors: Tensor) -> bool:
    """Tell whether what was computed here, of or as `tensors`, may be kept for later calls.

    A traced function has no memory. A fake tensor has no data. The memory of a CUDA graph that is being captured is
    written anew by each replay, and an inference tensor cannot be used in training.
    """
    if torch.compiler.is_compiling():  # first: the questions below are none that Dynamo could answer
        return False
    if any(type(each) not in (Tensor, nn.Parameter) or each.is_inference() for each in tensors):
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
