"""Recognition of out-of-memory errors, which each library reports in its own way."""

import torch

FAILED_ALLOCATIONS = (
    "OutOfMemoryError",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no algorithm's workspace could be allocated
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether `error` is an allocation on the device that failed, torch's own or one within cuDNN or cuBLAS."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in FAILED_ALLOCATIONS)
