"""What a measurement was made on, and the memory that it took."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from detr_profiling.measuring import machine, memory
from detr_profiling.measuring.machine import describe_machine
from detr_profiling.measuring.memory import peak_memory

CPU = torch.device("cpu")


def test_the_machine_is_described() -> None:
    found = describe_machine(CPU)
    assert found.device == found.processor and found.threads == torch.get_num_threads()
    assert found.versions["torch"] == torch.__version__.partition("+")[0]
    assert found.gpu_memory_gib is None and found.driver is None and found.memory_gib > 1
    assert found.to_dict()["commit"] == found.commit


def test_a_commit_can_be_named_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_machine(CPU).commit is None
    monkeypatch.setenv("DETR_FAST_COMMIT", "abc1234")
    assert describe_machine(CPU).commit == "abc1234"


def test_peak_memory_is_that_of_the_work_alone() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux alone keeps a peak that can be restarted")
    with peak_memory(CPU) as larger, mmap.mmap(-1, 384 << 20) as held:  # whatever an allocator does with what is freed
        np.frombuffer(held, np.uint8)[:] = 1
    with peak_memory(CPU) as smaller:
        pass
    assert 300 < larger.mib - smaller.mib < 500


def test_no_peak_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / "absent")
    with peak_memory(CPU) as peak:
        pass
    assert np.isnan(peak.mib)
