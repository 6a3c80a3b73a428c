"""Triton and its language, or, where Triton is not installed, stand-ins that let the kernels' files be imported.

Kernels are not specialised (`do_not_specialize`) on numbers that differ from batch to batch: each new one would be
compiled anew in the middle of training. Nor on the alignment of UNALIGNED: a slice of a batch may begin anywhere, and
while a CUDA graph is captured no new variant can be loaded. INTERPRETED says whether kernels were made to run on the
CPU, by TRITON_INTERPRET=1 at import.
"""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    INSTALLED: bool
    INTERPRETED: bool
else:
    try:
        import triton
        import triton.language as tl

        INSTALLED, INTERPRETED = True, triton.knobs.runtime.interpret
    except ModuleNotFoundError:

        def jit(function: Any = None, **options: Any) -> Any:
            """Return the function as it is; `launch` refuses to run it."""
            return (lambda function: function) if function is None else function

        triton = SimpleNamespace(jit=jit)
        tl = SimpleNamespace(constexpr=object)
        INSTALLED = INTERPRETED = False


UNALIGNED = ["num_targets", "labels"]
"""Arguments that may be slices of a batch's, and begin at any multiple of 8 bytes."""


@triton.jit
def gemm(a, b, total, INTERPRETED: tl.constexpr):
    """Compute total + a @ b, or a @ b with None, in float32 without TF32. The interpreter cannot multiply bfloat16."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


__all__ = ["INSTALLED", "INTERPRETED", "UNALIGNED", "gemm", "tl", "triton"]
