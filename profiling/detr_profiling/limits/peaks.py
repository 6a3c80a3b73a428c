"""The machine's peaks, measured here and now: its memory bandwidth, and the rate of a GEMM.

Each is the best of several runs, not their median: a peak is a limit, and what only slows a run down is no part of it.
Data are random, since zeros cost a GPU less power and so run faster.
On a CPU both are those of as many threads as torch uses;
there a store also reads the line it writes to, which is not counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

COPY_MIB = {"cpu": 256, "cuda": 2048}
"""MiB of the tensor that is copied: many times what caches hold (32 MiB on the test machine, 50 MiB on an H100)."""
LEAST_COPY_MIB = 256
"""Where a GPU's memory is nearly full."""
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices: enough that the multiplications, not the bytes, take the time."""

MOST_RUNS = 20
BUDGET_S = 1.0
"""No run begins later than this; a first one always does."""


@dataclass(frozen=True)
class Peaks:
    """Holds the limits of one machine, each the best of several runs."""

    bandwidth_gb_s: float
    """10^9 bytes/s of a large copy, those read and those written."""
    gemm_tflop_s: float
    """10^12 FLOP/s of a large GEMM, two for every multiply-add."""
    dtype: str
    """Precision of the GEMM's matrices: bf16, fp16, fp32 or fp64. fp32 on a GPU is TF32 where torch is set to it."""


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure both peaks of `device` as torch is set up now, the GEMM's in `dtype`; takes 3 s, and 0.5 GiB on a CPU."""
    return Peaks(bandwidth_gb_s(device), gemm_tflop_s(device, dtype), DTYPES[dtype])


def bandwidth_gb_s(device: torch.device) -> float:
    mib = COPY_MIB[device.type]
    while True:
        try:
            source = torch.rand(mib * 2**18, device=device)
            target = torch.empty_like(source)
            break
        except torch.OutOfMemoryError:
            if mib <= LEAST_COPY_MIB:
                raise
            mib //= 2
    return 2 * source.nbytes / best_s(lambda: target.copy_(source), device) / 1e9


def gemm_tflop_s(device: torch.device, dtype: torch.dtype) -> float:
    side = GEMM_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * side**3 / best_s(lambda: torch.mm(a, b, out=product), device) / 1e12


def best_s(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of the fastest `run` after one to warm up, by the device's clock, or the host's on a CPU."""
    seconds = device_s if device.type == "cuda" else host_s
    seconds(run)
    until = time.perf_counter() + BUDGET_S
    best = seconds(run)
    for _ in range(MOST_RUNS - 1):
        if time.perf_counter() > until:
            break
        best = min(best, seconds(run))
    return best


def host_s(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def device_s(run: Callable[[], Any]) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3
