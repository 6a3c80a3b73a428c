"""What kernels/README.md shows runs as it stands there, and its table names what there is."""

import re
from pathlib import Path

import detr_kernels
import pytest

README = (Path(__file__).parents[1] / "kernels" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_runs(block: str) -> None:
    assert len(block.splitlines()) <= 13
    exec(block, {})


def test_every_function_has_a_row_and_an_example() -> None:
    functions = {
        name
        for name in detr_kernels.__all__
        if name.islower() and not name.startswith("why_") and not name.endswith("_ref")
    }
    assert functions == set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE))
    shown = "".join(BLOCKS)
    assert all(name in shown for name in functions - {"conv1x1_bias_act"})  # which conv_bias_act calls


def test_every_operation_has_a_row_with_its_backends() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| ([\w, ]+) \|", README, re.MULTILINE))
    rows = {name: backends for name, backends in rows.items() if name not in ("operation", "function")}
    assert rows == {name: ", ".join(operation.names) for name, operation in detr_kernels.OPERATIONS.items()}
