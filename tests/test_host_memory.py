"""The host's allocator: what is chosen, what it does, and that a choice which cannot be had is refused."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr_fast import host_memory
from detr_fast.config import UserError
from detr_fast.host_memory import Process, choose_host_allocator, use_host_allocator
from detr_fast.options import RuntimeOptions
from detr_fast.runtime import choose_runtime

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    """A process in which nothing was decided; nothing is done to this one."""
    CALLS.clear()
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: CALLS.append("kept"))
    monkeypatch.setattr(host_memory, "PROCESS", Process())
    return host_memory.PROCESS


CALLS: list[str] = []
"""Calls that would have changed the process."""


@needs_glibc
def test_auto_keeps_freed_memory_on_a_cpu() -> None:
    assert choose_host_allocator("auto", CPU)[0] == "keep"
    assert choose_host_allocator("auto", GPU) == (None, "tensors lie on cuda")
    runtime = choose_runtime(RuntimeOptions(device="cpu"))
    assert runtime.host_allocator == "keep" and runtime.reasons["host allocator"].startswith("keep (on a CPU")
    asked = choose_runtime(RuntimeOptions(device="cpu", host_allocator="system"))
    assert asked.host_allocator == "system" and asked.reasons["host allocator"] == "system (asked for)"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="one of auto, keep, system, not 'jemalloc'"):
        choose_host_allocator("jemalloc", CPU)


@needs_glibc
def test_a_choice_alone_does_nothing(process: Process) -> None:
    choose_runtime(RuntimeOptions(device="cpu"))
    assert process.allocator is None and not CALLS


def test_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "why_not_kept", lambda: "there is no glibc, whose mallopt it takes")
    assert choose_host_allocator("auto", CPU) == (None, "there is no glibc, whose mallopt it takes")
    with pytest.raises(UserError, match=r"--host-allocator keep cannot be had: there is no glibc.*auto"):
        choose_host_allocator("keep", CPU)


@needs_glibc
@pytest.mark.parametrize("first", ["auto", "keep"])
def test_what_is_kept_cannot_be_given_back(first: str) -> None:
    use_host_allocator(choose_host_allocator(first, CPU)[0])
    assert CALLS == ["kept"]
    with pytest.raises(UserError, match=r"--host-allocator system cannot be had: this process keeps.*another process"):
        choose_host_allocator("system", CPU)
    assert choose_host_allocator("auto", GPU) == ("keep", "decided before, for all of this process")


@needs_glibc
def test_what_was_asked_for_by_name_stays_until_another_name() -> None:
    use_host_allocator(choose_host_allocator("system", CPU)[0])
    assert not CALLS
    assert choose_host_allocator("auto", CPU) == ("system", "decided before, for all of this process")
    use_host_allocator(choose_host_allocator("keep", CPU)[0])
    assert choose_host_allocator("auto", CPU)[0] == "keep"


FAULTS = """
import resource, torch
from detr_fast.host_memory import keep_freed_memory
{call}
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    """64 MiB eight times: 16,384 pages each are mapped anew, or once."""
    faults = {}
    for call in ("", "keep_freed_memory()"):
        command = [sys.executable, "-c", FAULTS.format(call=call)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        faults[call] = int(done.stdout)
    assert faults["keep_freed_memory()"] <= max(1000, faults[""] / 4)


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IN_LARGE_PAGES = """
import torch
from pathlib import Path
from detr_fast.host_memory import keep_freed_memory
keep_freed_memory()
kept = torch.ones(2**26)
print([line.split()[1] for line in Path("/proc/self/smaps_rollup").open() if line.startswith("AnonHugePages")][0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="the kernel gives no large pages"
)
def test_memory_comes_in_large_pages() -> None:
    """At least half of 256 MiB, as the kernel has them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", IN_LARGE_PAGES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) > 2**17  # KiB
