"""The host's memory allocator: freed memory is kept by the process, in huge pages, or given back, as glibc does.

The choice is process-wide. Keeping can be turned on at any time, and not off again.
"""

import ctypes
import mmap
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

from detr_fast.config import require
from detr_fast.options import HostAllocator

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Names of mallopt(3)."""
NEVER = -1
TOP_PAD_BYTES = 2**28
RESERVED_BYTES = 2**32
HUGE_PAGE_BYTES = 2**21

Allocator = Literal["keep", "system"]


@dataclass
class Process:
    """Remembers what was decided for this process."""

    allocator: Allocator | None = None
    """None: nobody has decided, and it is glibc's."""


PROCESS = Process()


def choose_host_allocator(asked: HostAllocator, device: torch.device) -> tuple[Allocator | None, str]:
    """Choose what `use_host_allocator` is to do (None: nothing), and return it with the reason.

    `auto` keeps to what was decided for this process before. Raises UserError where what is asked for by name cannot be
    had: `system` in a process that keeps freed memory already, `keep` without glibc; or is none of the names.
    """
    names = get_args(HostAllocator)
    require(asked in names, f"The host's allocator is one of {', '.join(names)}, not {asked!r}.")
    problem = why_not_kept()
    if asked == "system":
        require(
            PROCESS.allocator != "keep",
            "--host-allocator system cannot be had: this process keeps freed memory already, for all that runs in it, "
            "and glibc has no way back. Start another process, or give --host-allocator keep.",
        )
        return "system", "asked for"
    if asked == "keep":
        require(problem is None, f"--host-allocator keep cannot be had: {problem}. Use --host-allocator auto.")
        return "keep", "asked for"
    if PROCESS.allocator is not None:
        return PROCESS.allocator, "decided before, for all of this process"
    if device.type != "cpu":
        return None, f"tensors lie on {device.type}"
    if problem is not None:
        return None, problem
    return "keep", "on a CPU: freed memory is used again, in large pages"


def use_host_allocator(choice: Allocator | None) -> None:
    """Apply the choice of `choose_host_allocator` to this process from now on."""
    if choice == "keep":
        keep_freed_memory()
    if choice is not None:
        PROCESS.allocator = choice


def why_not_kept() -> str | None:
    """Say why freed memory cannot be kept here; None where it can."""
    return None if hasattr(ctypes.CDLL(None), "mallopt") else "there is no glibc, whose mallopt it takes"


@cache
def keep_freed_memory() -> None:
    """Let malloc keep freed memory for this process, in one heap with huge pages, instead of unmapping large blocks.

    By default glibc maps each block of megabytes by itself, and the kernel then clears all its pages anew: a fifth of a
    million page faults a training step on a CPU. Here the heap's first 4 GiB are advised to be pages of 2 MiB, since
    with 4 KiB finding a page takes longer than reading it. Physical memory is used only where it is written to. Without
    glibc nothing changes.
    """
    if why_not_kept() is not None:
        return
    libc = ctypes.CDLL(None)
    for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, TOP_PAD_BYTES)):
        libc.mallopt(name, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    reserved = libc.malloc(RESERVED_BYTES)
    if reserved:
        first = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        libc.madvise(first, RESERVED_BYTES - HUGE_PAGE_BYTES, mmap.MADV_HUGEPAGE)
        libc.free(reserved)
