"""The doctor on machines that lack something: every row says what follows or what to do."""

import sys
from pathlib import Path

import pytest
import torch

from detr_fast import doctor


def test_table_has_a_row_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(doctor.DoctorOptions()) == 0
    table = capsys.readouterr().out
    for subject in ("Python", "torch", "GPU", "CPU", "C++", "triton", "xformers", "hotcoco", "disk", "cache"):
        assert subject in table


def test_what_is_missing_has_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", "")
    for finding in doctor.examine():
        assert finding.follows or not finding.missing, finding


def test_no_gpu_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (finding,) = doctor.check_gpus()
    assert finding.missing
    assert "nvidia-ml-py" in finding.follows


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor.check_compiler()
    assert finding.missing
    assert "no-such-compiler" in finding.found
    assert "apt install" in finding.follows


def test_no_python_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr("detr_fast.runtime.sysconfig.get_path", lambda name: str(tmp_path))
    assert "-dev" in doctor.check_compiler().follows


def test_package_that_is_absent_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_package("no_such_package", "this", "not that").found == "not installed"
    (tmp_path / "broken_package.py").write_text("raise ImportError('libfoo.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = doctor.check_package("broken_package", "this", "not that")
    assert broken.missing
    assert "libfoo.so.1" in broken.found


@pytest.mark.parametrize("problem", ["xformers cannot be imported (ImportError: no)", None])
def test_xformers_that_does_not_load_is_named_with_what_follows(
    problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "why_not_xformers", lambda: problem)
    finding = doctor.check_xformers()
    assert finding.missing is bool(problem)
    if problem:
        assert finding.found == problem and "cannot run" in finding.follows and "make setup" in finding.follows
    else:
        assert "FlashAttention" in finding.found


def test_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FREE_GIB", 1 << 40)
    assert "make room" in doctor.check_disk(tmp_path).follows


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    assert not doctor.check_cache(tmp_path / "new" / "folder").missing
    file = tmp_path / "file"
    file.touch()
    assert "DETR_FAST_CACHE" in doctor.check_cache(file / "cache").follows
