"""A GPU that is not there: torch takes one for initialised, and fake tensors on it go forward and backward.

FakeTensorMode knows shape and dtype of a tensor on `cuda`, and needs no driver; what depends on values (`.item()`,
`nonzero`, a boolean index) raises there. Three things still look for the device. Code asks what GPU it is: an H200.
Autograd's engine asks CUDA's hooks whether the device has a context, before it looks up a stream: the hooks get a table
of virtual functions in which that one says no. And the engine starts a thread for the device, unless threads are off.
Triton's launches are handed over instead of made.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from detr_kernels import launch as launcher
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

Module = TypeVar("Module", bound=nn.Module)

DEVICE = torch.device("cuda", 0)
NAME, CAPABILITY = "NVIDIA H200", (9, 0)
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=141 << 30, multi_processor_count=132, warp_size=32, L2_cache_size=50 << 20
)
"""Properties of the device, as many of them as torch asks for."""

HAS_PRIMARY_CONTEXT = 2 + 4
"""Its place in the table of torch 2.11's `at::CUDAHooksInterface`: offset and type come first, then two destructors,
isBuilt, isAvailable, and this one."""
KNOWN = "2.11."
TABLE = 2 + 80
"""More entries than the table has."""


def _no_launch(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def absent_gpu(launch: launcher.Launch = _no_launch) -> Iterator[torch.device]:
    """Yield `cuda:0`, on which fake tensors can be made, trained with and compiled for; nothing runs.

    `launch` is called with each launch of Triton. Raises RuntimeError where there is a GPU, or another torch.
    """
    if torch.cuda.is_available():
        raise RuntimeError("There is a GPU: run on it.")
    if not torch.__version__.startswith(KNOWN):
        raise RuntimeError(f"Where CUDA's hooks have what is replaced is known of torch {KNOWN}: this is another.")
    state = torch.zeros(16, dtype=torch.uint8)  # the generator's, as the host sees it
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "_initialized": True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: DEVICE.index,
        "get_device_properties": lambda *_: PROPERTIES,
        # disabled: Dynamo cannot look into the real ones either, and could into these
        "get_device_name": torch.compiler.disable(lambda *_: NAME),
        "get_device_capability": torch.compiler.disable(lambda *_: CAPABILITY),
        "get_rng_state": lambda *_: state,
        "set_rng_state": lambda *_: None,
    }
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())  # first: it asks whether there is a GPU, and sets guards that need none
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", lambda: False))
        stack.enter_context(patch.object(torch._subclasses.fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        # several tensors in one launch: torch looks for the type Tensor itself, which a fake one does not have
        stack.enter_context(patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True))
        stack.enter_context(patch.object(launcher, "INTERPRETED", False))
        stack.enter_context(_without_context())
        stack.enter_context(launcher.launches_to(launch))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield DEVICE


def made_on(device: torch.device, make: Callable[[], Module]) -> Module:
    """Make a module on `device`; on the absent one its tensors are fake, and hold nothing.

    Not every module can be made of fake tensors: there they take the places of others of the same
    shapes without memory.
    """
    if detect_fake_mode() is None:
        with device:
            return make()
    with unset_fake_temporarily(), torch.device("meta"):
        module = make()
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, real in tensors.items():
                if real is not None:
                    fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
                    like = nn.Parameter(fake, real.requires_grad) if isinstance(real, nn.Parameter) else fake
                    tensors[name] = like  # type: ignore[assignment]
    return module


@contextmanager
def _without_context() -> Iterator[None]:
    """Have CUDA's hooks answer of every device that it has no context."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    pointer = ctypes.cast(get_hooks(), ctypes.POINTER(ctypes.c_void_p))
    before = pointer[0]
    assert before is not None
    entry = ctypes.sizeof(ctypes.c_void_p)
    table = (ctypes.c_void_p * TABLE).from_buffer_copy(ctypes.string_at(before - 2 * entry, TABLE * entry))
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda *_: False)
    table[HAS_PRIMARY_CONTEXT] = ctypes.cast(no, ctypes.c_void_p).value
    pointer[0] = ctypes.addressof(table) + 2 * entry
    try:
        yield
    finally:
        pointer[0] = before
