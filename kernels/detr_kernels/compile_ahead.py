"""`python -m detr_kernels.compile_ahead`: compiles every launch for GPUs that are not there, and says what each uses.

The launchers run as they are, on tensors without data (the meta device), so that what is compiled is what a GPU would
be given: same specialisation, same blocks, same warps. Registers, stack and shared memory are read from the machine
code. A kernel that spills shows a stack.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_kernels import (
    assignment,
    convolution,
    convolution_gradients,
    convolution_tail,
    detection_loss,
    layer_norm,
    matching_cost,
    pixels,
    triton_attention,
    triton_attention_backward,
)
from detr_kernels.dispatch import launches_to
from detr_kernels.language import INTERPRETED, triton

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""
IMAGES, QUERIES, LAYERS, DIM, HEADS, CLASSES, TARGETS = 16, 100, 6, 256, 8, 91, 63
TOKENS = 25 * 34
"""Of one 800x1066 image at stride 32."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of which only shape and dtype exist."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_layer_norm() -> None:
    x, residual = meta(IMAGES * TOKENS, DIM), meta(IMAGES * TOKENS, DIM, dtype=torch.float32)
    weight, seed = meta(DIM, dtype=torch.float32), meta(1, dtype=torch.int64)
    y, total = layer_norm._forward(x, residual, weight, weight, seed, 1e-5, 0.1, True)
    layer_norm._backward(y, total, weight, seed, 1e-5, 0.1, x.dtype, residual.dtype)


def launch_assignment() -> None:
    for queries in (QUERIES, 300):
        cost = meta(LAYERS * IMAGES, queries, TARGETS, dtype=torch.float32)
        assignment._solve(cost, meta(LAYERS * IMAGES, dtype=torch.int64))


def launch_match_cost() -> None:
    for logits, boxes, labels, target_boxes in predictions_and_targets():
        matching_cost._forward(logits, boxes, labels, target_boxes, 1.0, 5.0, 2.0)


def launch_set_loss() -> None:
    for logits, boxes, labels, target_boxes in predictions_and_targets():
        counts, query_of_target = (meta(*shape, dtype=torch.int64) for shape in ((IMAGES,), (LAYERS, *labels.shape)))
        scalar = meta(dtype=torch.float32)
        tensors = (logits, boxes, labels, target_boxes, counts, query_of_target, scalar, scalar)
        d_terms = detection_loss._forward(*tensors, 0.1)
        detection_loss._backward(d_terms, *tensors[:4], *tensors[5:], 0.1)


def predictions_and_targets() -> Iterator[tuple[Tensor, ...]]:
    """Logits and boxes of every layer, labels and boxes of the targets: with the model's float32 logits, and bf16."""
    boxes = meta(LAYERS, IMAGES, QUERIES, 4, dtype=torch.float32)
    target_boxes = meta(IMAGES, TARGETS, 4, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        logits = meta(LAYERS, IMAGES, QUERIES, CLASSES + 1, dtype=dtype)
        yield logits, boxes, meta(IMAGES, TARGETS, dtype=torch.int64), target_boxes


def launch_resize_normalize_pad() -> None:
    buffer, table = meta(IMAGES * 480 * 640 * 3, dtype=torch.uint8), meta(IMAGES, 6, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        pixels._forward(buffer, table, 800, 1066, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype)


def launch_conv1x1() -> None:
    """A layer of each of ResNet-50's stages, and a shortcut without a ReLU."""
    for inputs, outputs, height, width, stride, residual in (
        (64, 256, 200, 267, 1, True),
        (256, 128, 200, 267, 1, False),
        (1024, 256, 50, 67, 1, False),
        (512, 2048, 25, 34, 1, True),
        (256, 512, 200, 267, 2, False),
    ):
        x, weight = meta(IMAGES, inputs, height, width), meta(outputs, inputs, 1, 1)
        bias, relu = meta(outputs, dtype=torch.float32), stride == 1
        y = meta(IMAGES, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
        convolution._forward(x, weight, bias, y if residual else None, stride, relu)
        mask = y if relu and not residual else None  # with a residual, dy is masked once for all
        convolution_gradients._input_gradient(y, mask, weight, height, width, stride)
        convolution_gradients._weight_gradient(y, mask, x, stride, False)


def launch_convolution_tail() -> None:
    """The 3x3 of layer3, and a learned bias."""
    conv, bias = meta(IMAGES, 256, 50, 67), meta(256, dtype=torch.float32)
    y = convolution_tail._forward(conv, bias, None, True)
    convolution_tail._backward(conv, y)


def launch_packed_attention() -> None:
    """The encoder's self-attention, its queries and keys of one projection, and the decoder's cross-attention."""
    offsets, seed = meta(IMAGES + 1, dtype=torch.int32), meta(1, dtype=torch.int64)
    of_tokens, of_queries = (meta(IMAGES * longest, HEADS, DIM // HEADS) for longest in (TOKENS, QUERIES))
    halves = [half.unflatten(1, (HEADS, -1)) for half in meta(IMAGES * TOKENS, 2 * DIM).chunk(2, 1)]
    for q, k, longest in ((*halves, [TOKENS, TOKENS]), (of_queries, of_tokens, [QUERIES, TOKENS])):
        out, lse = triton_attention._forward(q, k, of_tokens, offsets, offsets, seed, longest, 0.1)
        triton_attention_backward._backward(out, q, k, of_tokens, out, lse, offsets, offsets, seed, longest, 0.1)


SPECIMENS: dict[str, Callable[[], None]] = {
    "conv1x1_bias_act": launch_conv1x1,
    "conv_bias_act": launch_convolution_tail,
    "resize_normalize_pad": launch_resize_normalize_pad,
    "fused_add_layer_norm": launch_layer_norm,
    "batched_assignment": launch_assignment,
    "match_cost": launch_match_cost,
    "set_loss": launch_set_loss,
    "packed_attention": launch_packed_attention,
}
"""Public function -> all its launches at the shapes of DETR-R50 on 16 images of 800x1066 in bf16, as under autocast."""

NOTE = "Shapes of DETR-R50, 16 images of 800x1066, bf16 under autocast; a stack of 0 bytes means that nothing spills."


@dataclass(frozen=True)
class Compiled:
    """One launch compiled for each capability, in their order."""

    function: str
    kernel: str
    first: str
    """Shape and dtype of its first argument, to tell launches of one kernel apart."""
    warps: int
    registers: list[int]
    """A thread."""
    shared_bytes: list[int]
    stack_bytes: list[int]
    """A thread; what did not fit into registers, or is indexed at run time."""


class AbsentGpu:
    """What Triton asks of a driver when it compiles: a target, and that there is a device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def recorded_launches(specimen: Callable[[], None]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Kernel, arguments and options of every launch that `specimen` makes; nothing runs."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append((kernel, arguments, options))

    with launches_to(record):
        specimen()
    return launches


def compile_launches(functions: list[str], capabilities: list[int]) -> Iterator[Compiled]:
    """Every launch of `functions` for each of `capabilities`."""
    for function in functions:
        for kernel, arguments, options in recorded_launches(SPECIMENS[function]):
            first = f"({', '.join(map(str, arguments[0].shape))}) {str(arguments[0].dtype).removeprefix('torch.')}"
            row = Compiled(function, kernel.fn.__name__, first, options["num_warps"], [], [], [])
            for capability in capabilities:
                triton.runtime.driver.set_active(AbsentGpu(capability))
                compiled = kernel.warmup(*arguments, grid=(1,), **options)
                registers, stack_bytes = resources(compiled.asm["cubin"])
                row.registers.append(registers)
                row.shared_bytes.append(compiled.metadata.shared)
                row.stack_bytes.append(stack_bytes)
            yield row


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the machine code states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def table(rows: list[Compiled], capabilities: list[int]) -> str:
    """The rows as Markdown."""
    on = " / ".join(f"sm_{capability}" for capability in capabilities)
    head = ["function", "kernel", "first argument", "warps", f"registers, {on}", "shared, bytes", "stack, bytes"]
    cells = [
        [" / ".join(map(str, value)) if isinstance(value, list) else str(value) for value in vars(row).values()]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detr_kernels.compile_ahead", description=__doc__)
    parser.add_argument("functions", nargs="*", help=f"which of {', '.join(SPECIMENS)}; all if none is named")
    parser.add_argument("--sm", type=int, nargs="+", default=list(CAPABILITIES), help="compute capabilities")
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args(argv)
    if unknown := set(options.functions) - SPECIMENS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(SPECIMENS)}.")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and nothing compiles then: unset it")
    rows = list(compile_launches(options.functions or list(SPECIMENS), options.sm))
    text = table(rows, options.sm)
    print(text, end="")
    if options.out:
        command = f"`python -m detr_kernels.compile_ahead --out {options.out}`"
        options.out.write_text(f"Printed by {command} with Triton {triton.__version__}. {NOTE}\n\n{text}")


if __name__ == "__main__":
    main()
