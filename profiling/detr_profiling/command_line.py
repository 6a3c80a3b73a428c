"""Options as the command lines of this package take them."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from detr_profiling.workload import WorkloadOptions


def arguments(options: Mapping[str, Any], always: Collection[str] = ()) -> Iterator[str]:
    """Yield flags and values of `options`, by name, but for those that are a workload's defaults; a flag that is off by
    default needs no mention either. `always`: names whose defaults differ between commands."""
    defaults = WorkloadOptions().to_dict()
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name not in always and (value is None or str(value) == str(defaults.get(name, False))):
            continue
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))
