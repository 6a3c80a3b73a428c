"""The benchmarks themselves: their ids, that a wrong result has no time, and what stands beside a right one's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_profiling.own_workload import build_workload
from detr_profiling.workload import WorkloadOptions

from benchmarks import bench_kernels
from benchmarks.clock import DEVICE, NOT_COMPARABLE
from benchmarks.gate import PlainObservations
from detr_fast.runtime import multiplies_bf16

CHECKOUT = Path(__file__).parents[1]
FILES = ("data", "evaluation", "backends", "inference", "kernels", "loss", "training")
ID = re.compile(r"benchmarks/bench_(\w+)\.py::bench_\w+\[[a-z0-9-]+-(fp32|tf32|bf16|fp64|uint8)-\d+x\d+-b\d+\]")
FAST = ("read-ours-uint8-64x64", "hotcoco-fp64", "auto-fp32-100x20", "tiny-fp32-64x64-b16", "match-cost-plain-fp32")
"""A second or two each."""


def run_benchmarks(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST")  # those are of the tests, and beside xdist nothing is timed
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    environment = kept | variables
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300)


def test_ids_say_what_precision_size_and_batch() -> None:
    collected = run_benchmarks("benchmarks", "--collect-only", "--size", "full").stdout.splitlines()
    ids = [line for line in collected if "::" in line]
    matched = [ID.fullmatch(line) for line in ids]
    assert not [line for line, match in zip(ids, matched, strict=True) if not match]
    assert {match[1] for match in matched if match} == set(FILES)
    assert len(set(ids)) == len(ids)
    assert any("bench_training[auto-bf16-800x1066-b" in line for line in ids) == multiplies_bf16(DEVICE)


PLANTED = """
import pytest

@pytest.fixture(autouse=True)
def planted(monkeypatch):
    from dataclasses import replace
    from detr_fast.data.coco import CocoDataset
    from detr_fast.evaluation import coco_metrics
    from detr_fast.training.criterion import SetCriterion
    read, evaluate, forward = CocoDataset.read, coco_metrics.run_hotcoco, SetCriterion.forward

    def off_in_the_last_bit(truth, detections, most):
        numbers, *rest = evaluate(truth, detections, most)
        return numbers * (1 + 2**-52), *rest

    def off_by_one_percent(self, *arguments):
        terms = forward(self, *arguments)
        return {**terms, "loss": terms["loss"] * 1.01}

    def coarse(self, index, augmentation):
        sample = read(self, index, augmentation)
        return replace(sample, image=sample.image // 4 * 4)

    monkeypatch.setattr(CocoDataset, "read", coarse)
    monkeypatch.setattr(coco_metrics, "run_hotcoco", off_in_the_last_bit)
    monkeypatch.setattr(SetCriterion, "forward", off_by_one_percent)
"""


def test_a_wrong_result_has_no_time(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    files = [f"benchmarks/bench_{name}.py" for name in ("data", "evaluation", "loss")]
    chosen = ["-k", " or ".join(FAST), "--benchmark-only", f"--benchmark-json={tmp_path / 'times.json'}"]
    done = run_benchmarks(*files, *chosen, "-p", "planted", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "3 failed" in done.stdout and "passed" not in done.stdout, done.stdout
    assert "the twelve numbers differ" in done.stdout
    assert re.search("quantities are wrong, such as loss", done.stdout)
    assert not (tmp_path / "times.json").exists() or not json.loads((tmp_path / "times.json").read_text())["benchmarks"]


def test_times_come_with_error_memory_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    done = run_benchmarks("benchmarks", "-k", " or ".join(FAST), "--benchmark-only", f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())
    assert torch.__version__.startswith(found["machine_info"]["detr_profiling"]["versions"]["torch"])
    assert len(found["benchmarks"]) == len(FAST)
    for each in found["benchmarks"]:
        assert ID.fullmatch(each["fullname"])
        extra, stats = each["extra_info"], each["stats"]
        assert 0 <= extra["error"] <= extra["allowed"] and extra["quantity"]
        assert stats["rounds"] >= 5 and 0 < stats["q1"] <= stats["median"] <= stats["q3"]
        assert extra["images_per_second"] == pytest.approx(extra["images"] / stats["median"])
        assert extra["peak_mib"] > 10 and extra["threads"] >= 1 and extra["torch"] and extra["device"]


def test_without_the_clock_each_runs_once() -> None:
    done = run_benchmarks("benchmarks", "-k", " or ".join(FAST[:3]), "--benchmark-disable")
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


def test_a_model_that_is_off_by_one_percent_does_not_pass(tmp_path: Path) -> None:
    options = WorkloadOptions.of(size="64x96", batch_size=1, device="cpu", precision="fp32", objects=3)
    workload, plain = build_workload(options), PlainObservations(tmp_path)
    verdict = plain.judge(workload, tf32=True)
    assert verdict.error is not None and verdict.allowed is not None and verdict.error <= verdict.allowed
    made = sorted(tmp_path.iterdir())
    with torch.no_grad():
        workload.model.class_embed.weight.mul_(1.01)  # type: ignore[union-attr, operator]
    with pytest.raises(AssertionError, match="quantities are wrong, such as logits"):
        plain.judge(workload, tf32=True)
    assert len(made) == 2 and sorted(tmp_path.iterdir()) == made  # the exact and the eager errors are made once
    workload.observe = None
    assert plain.judge(workload, tf32=True) == NOT_COMPARABLE


def test_a_kernel_that_is_off_by_one_percent_does_not_pass() -> None:
    torch.manual_seed(0)
    kernels = bench_kernels.make_kernels(1, 64, 96)
    names = ("conv1x1-64-256", "cross-attention", "add-layer-norm", "match-cost", "set-loss", "assignment")
    for name in (*names, "residual-stage", "dropout", "dropout-attention"):
        kernel = kernels[name]
        inputs = kernel.make(kernel.dtype)

        def plain(*values: Any, kernel: bench_kernels.Kernel = kernel) -> Any:
            return kernel.call(*values, backend=kernel.baseline)

        def wrong(*values: Any, kernel: bench_kernels.Kernel = kernel, plain: Any = plain) -> Any:
            result = plain(*values)
            if not isinstance(result, torch.Tensor):
                return result._replace(ce=result.ce * 1.01)
            if result.dtype == torch.int64:
                return result.roll(1, -1)
            return result * (1.5 if kernel.draws else 1.01)  # of so few random numbers the mean is rough

        verdict = bench_kernels.judge(kernel, plain, plain, inputs)
        assert verdict.error is not None and verdict.allowed is not None and verdict.error <= verdict.allowed
        with pytest.raises(AssertionError):
            bench_kernels.judge(kernel, wrong, plain, inputs)
