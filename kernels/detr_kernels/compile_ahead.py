"""`python -m detr_kernels.compile_ahead`: every launch, compiled for GPUs that are not there, and what each uses.

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

from detr_kernels.launch import launches_to
from detr_kernels.operations import OPERATIONS
from detr_kernels.triton_compat import INTERPRETED, triton

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""
SPECIMENS = {operation.name: operation.specimens for operation in OPERATIONS.values() if operation.specimens}
"""Operation -> all its launches at the shapes of DETR-R50 on 16 images of 800x1066 in bf16, as under autocast."""

NOTE = "Shapes of DETR-R50, 16 images of 800x1066, bf16 under autocast; a stack of 0 bytes means that nothing spills."


@dataclass(frozen=True)
class Compiled:
    """One launch compiled for each capability, in their order."""

    operation: str
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
    """Answers what Triton asks of a driver when it compiles: a target, and that there is a device."""

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
    """List kernel, arguments and options of every launch that `specimen` makes; nothing runs."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launches.append((kernel, arguments, options))

    with launches_to(record):
        specimen()
    return launches


def compile_launches(operations: list[str], capabilities: list[int]) -> Iterator[Compiled]:
    """Compile every launch of `operations` for each of `capabilities`."""
    for operation in operations:
        for kernel, arguments, options in recorded_launches(SPECIMENS[operation]):
            first = f"({', '.join(map(str, arguments[0].shape))}) {str(arguments[0].dtype).removeprefix('torch.')}"
            row = Compiled(operation, kernel.fn.__name__, first, options["num_warps"], [], [], [])
            for capability in capabilities:
                triton.runtime.driver.set_active(AbsentGpu(capability))
                compiled = kernel.warmup(*arguments, grid=(1,), **options)
                registers, stack_bytes = resources(compiled.asm["cubin"])
                row.registers.append(registers)
                row.shared_bytes.append(compiled.metadata.shared)
                row.stack_bytes.append(stack_bytes)
            yield row


def resources(cubin: bytes) -> tuple[int, int]:
    """Read registers and bytes of stack of a thread from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def table(rows: list[Compiled], capabilities: list[int]) -> str:
    """Render the rows as Markdown."""
    on = " / ".join(f"sm_{capability}" for capability in capabilities)
    head = ["operation", "kernel", "first argument", "warps", f"registers, {on}", "shared, bytes", "stack, bytes"]
    cells = [
        [" / ".join(map(str, value)) if isinstance(value, list) else str(value) for value in vars(row).values()]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *cells]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m detr_kernels.compile_ahead", description=__doc__)
    parser.add_argument("operations", nargs="*", help=f"which of {', '.join(SPECIMENS)}; all if none is named")
    parser.add_argument("--sm", type=int, nargs="+", default=list(CAPABILITIES), help="compute capabilities")
    parser.add_argument("--out", type=Path, help="Markdown file to write the table to")
    options = parser.parse_args(argv)
    if unknown := set(options.operations) - SPECIMENS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(SPECIMENS)}.")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, and nothing compiles then: unset it")
    rows = list(compile_launches(options.operations or list(SPECIMENS), options.sm))
    text = table(rows, options.sm)
    print(text, end="")
    if options.out:
        command = f"`python -m detr_kernels.compile_ahead --out {options.out}`"
        options.out.write_text(f"Printed by {command} with Triton {triton.__version__}. {NOTE}\n\n{text}")


if __name__ == "__main__":
    main()
