"""Every launch of every kernel compiles without a GPU, for three generations of them, and nothing spills."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detr_kernels.compile_ahead import CAPABILITIES, SPECIMENS, main, recorded_launches

KERNELS = Path(__file__).parents[1] / "kernels"


def compile_ahead(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: kernels that are interpreted here compile there."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, "-m", "detr_kernels.compile_ahead", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def rows(text: str) -> list[list[str]]:
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return table[2:]


def test_all_compile_and_none_spills(tmp_path: Path) -> None:
    result = compile_ahead("--out", str(tmp_path / "table.md"))
    assert result.returncode == 0, result.stderr
    table = rows(result.stdout)
    launches = sum(len(recorded_launches(specimen)) for specimen in SPECIMENS.values())
    assert len(table) == launches
    assert {row[0] for row in table} == set(SPECIMENS)
    for operation, kernel, _, _, *numbers in table:
        registers, shared_bytes, stack_bytes = ([int(each) for each in cell.split(" / ")] for cell in numbers)
        assert stack_bytes == [0] * len(CAPABILITIES), f"{operation}, {kernel} spills"
        assert all(0 < each <= 255 for each in registers) and max(shared_bytes) <= 99 * 1024
    assert rows((tmp_path / "table.md").read_text()) == table
    committed = rows((KERNELS / "COMPILED.md").read_text())
    assert committed == table, "write it again: python -m detr_kernels.compile_ahead --out kernels/COMPILED.md"


def test_every_kernel_has_a_specimen() -> None:
    jitted = {
        f"{path.stem}.{name}"
        for path in (KERNELS / "detr_kernels").rglob("*.py")
        for name in re.findall(r"@triton\.jit.*\ndef (_\w*kernel)\(", path.read_text())
    }
    launched = {
        f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        for specimen in SPECIMENS.values()
        for kernel, _, _ in recorded_launches(specimen)
    }
    assert launched == jitted


def test_a_slice_of_a_batchs_targets_compiles_nothing_anew() -> None:
    """A part of a batch may begin at any multiple of 8 bytes, and its copy begins at one of 16."""
    code = """if True:
        import torch
        from detr_kernels.matching import assignment
        from detr_kernels.compile_ahead import AbsentGpu, recorded_launches
        from detr_kernels.triton_compat import triton
        triton.runtime.driver.set_active(AbsentGpu(90))
        cost, counts = torch.zeros(6, 100, 8), torch.zeros(7, dtype=torch.int64)
        for part in (counts[:6], counts[1:]):
            ((kernel, arguments, options),) = recorded_launches(lambda: assignment._solve(cost, part))
            kernel.warmup(*arguments, grid=(1,), **options)
        print(len(kernel.device_caches[90][0]))
    """
    command = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "1\n"


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nonsense"], "Known: "), (["--sm", "ninety"], "invalid int value")]
)
def test_a_mistake_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 2 and message in capsys.readouterr().err
