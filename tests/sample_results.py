"""Results as the commands leave them, of a CPU and of a GPU, with figures made up for the tests of the report."""

import csv
import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from detr_profiling.measuring.row import LadderRow, column

MODEL = {"model": "detr_r50", "mode": "training", "size": "320x427", "batch_size": 1, "objects": 7, "dropout": None}
CLIMB = {
    # technique: ms, spread, MiB, error, allowed, ms without it, medians of both rounds
    "reference": (912.4, 25.3, 2104, 3.1e-6, 9.4e-6, None, "905 921"),
    "losses at once": (871.9, 22.1, 2098, 3.3e-6, 9.4e-6, None, "868 877"),
    "bf16": (655.2, 31.7, 1544, 1.21e-2, 2.6e-2, 588.1, "641 660"),
    "channels-last": (671.8, 12.4, 1547, 1.21e-2, 2.6e-2, 431.0, "672 650"),
    "SDPA": (602.7, 9.9, 1410, 1.18e-2, 2.6e-2, 455.5, "600 606"),
    "folded batch norm": (488.3, 11.2, 1302, 1.3e-2, 2.6e-2, 503.9, "486 489"),
    "compile": (401.6, 14.5, 1238, 1.4e-2, 2.6e-2, 488.3, "400 405"),
}
CPU_RANGES = {
    "copy": 0.06,
    "pixels": 3.1,
    "backbone": 141.8,
    "encoder": 35.7,
    "decoder": 22.4,
    "heads": 1.9,
    "loss": 6.3,
    "matching": 2.2,
    "backward": 171.4,
    "optimizer": 14.9,
    "other": 2.1,
}
GPU_RANGES = {
    "data wait": 0.4,
    "backbone": 3.1,
    "encoder": 2.2,
    "decoder": 2.9,
    "loss": 1.6,
    "matching": 0.9,
    "backward": 11.3,
}


def machine(gpu: bool) -> dict[str, Any]:
    return {
        "device": "NVIDIA H100 80GB HBM3" if gpu else "AMD EPYC 9B14",
        "processor": "AMD EPYC 9B14",
        "cores": 2,
        "threads": 2,
        "memory_gib": 15.6,
        "capabilities": "sm_90" if gpu else "AVX512",
        "gpu_memory_gib": 79.2 if gpu else None,
        "power_limit_watts": 700.0 if gpu else None,
        "driver": "570.86.15" if gpu else None,
        "cuda": "12.8" if gpu else None,
        "python": "3.11.7",
        "versions": {"torch": "2.11.0", "torchvision": "0.26.0", "transformers": None},
        "commit": "28d3f62",
        "date": "2026-11-25",
    }


def ladder_rows(mode: str = "training", faster: float = 1.0) -> list[dict[str, Any]]:
    place = {"model": "detr_r50", "size": "320x427", "batch_size": 1, "threads": 2, "device": "AMD EPYC 9B14"}
    place |= {"torch": "2.11.0", "commit": "28d3f62", "date": "2026-11-25"}
    rows = []
    for technique, (ms, spread, mib, error, allowed, without_ms, rounds) in CLIMB.items():
        row = {"mode": mode, "technique": technique, "median_ms": ms / faster, "peak_mib": mib, "runs": 10, **place}
        row |= {"q1_ms": (ms - 0.4 * spread) / faster, "q3_ms": (ms + 0.6 * spread) / faster}
        row |= {"images_per_second": 1e3 * faster / ms, "speedup": CLIMB["reference"][0] / ms, "padding": 1.0}
        row |= {"error": error, "allowed": allowed, "quantity": "logits", "close": True, "round_medians_ms": rounds}
        row |= {
            "cpu_seconds_per_image": 1.9 * ms / faster / 1e3,
            "first_run_s": 31.2 if technique == "compile" else 1.1,
        }
        if without_ms:
            row |= {"without_median_ms": without_ms / faster, "without_q1_ms": 0.99 * without_ms / faster}
            row |= {"without_q3_ms": 1.01 * without_ms / faster, "without_runs": 10}
        rows.append(row)
    return rows


def range_rows(times_ms: dict[str, float], gpu: bool) -> list[dict[str, Any]]:
    total = sum(times_ms.values())
    return [
        {"name": name, "median_ms": ms, "q1_ms": 0.98 * ms, "q3_ms": 1.01 * ms, "runs": 3, "fraction": ms / total}
        | {"device_ms": 1.7 * ms if gpu else None}
        for name, ms in times_ms.items()
    ]


def memory_block(ranges: dict[str, float], gpu: bool, mib: float) -> dict[str, Any]:
    """Rises through forward, falls through backward, three times."""
    step_ms = sum(ranges.values())
    times_ms = np.linspace(0, 3 * step_ms, 600)
    within = (times_ms % step_ms) / step_ms
    wave = np.interp(within, [0, 0.02, 0.5, 0.56, 0.95, 1], [0.3, 0.32, 0.9, 1, 0.5, 0.3])
    curve = [[round(float(ms), 3), round(float(part) * mib, 2)] for ms, part in zip(times_ms, wave, strict=True)]
    operator = None if gpu else "aten::convolution_backward"
    return {"peak_mib": mib, "peak_range": "backward", "peak_operator": operator, "curve": curve} | {
        "growth_mib_per_step": 0.0,
        "leaking": False,
    }


def roofline_block(ranges: dict[str, float], bandwidth_gb_s: float, gemm_tflop_s: float) -> dict[str, Any]:
    work = {"pixels": (0.002, 1.6), "backbone": (27.4, 210), "encoder": (9.8, 160), "decoder": (4.9, 130)}
    work |= {"loss": (0.01, 2), "backward": (71.5, 900), "optimizer": (0.3, 640)}
    scale = 16 if bandwidth_gb_s > 100 else 1

    def row(name: str, gflop: float, mib: float, ms: float) -> dict[str, Any]:
        memory_ms, compute_ms = mib * 2**20 / bandwidth_gb_s / 1e6, gflop / gemm_tflop_s
        bound_ms = max(memory_ms, compute_ms)
        bound = "memory" if memory_ms > compute_ms else "compute"
        return {"name": name, "gflop": gflop, "minimum_mib": mib, "ms": ms, "bound_ms": bound_ms, "bound_by": bound} | {
            "times_bound": ms / bound_ms,
            "mfu": compute_ms / ms,
        }

    rows = [row(name, scale * g, scale * m, ranges[name] * 1.7) for name, (g, m) in work.items() if name in ranges]
    total = row("total", sum(r["gflop"] for r in rows), sum(r["minimum_mib"] for r in rows), sum(r["ms"] for r in rows))
    peaks = {"bandwidth_gb_s": bandwidth_gb_s, "gemm_tflop_s": gemm_tflop_s, "dtype": "bf16"}
    return {"peaks": peaks, "ranges": rows, "total": total}


def trace(gpu: bool = False) -> dict[str, Any]:
    ranges = GPU_RANGES if gpu else CPU_RANGES
    step_ms = sum(ranges.values())
    names = ["convolution_backward", "mkldnn_convolution", "mm", "addmm", "native_layer_norm", "gelu", "relu_", "add_"]
    names += ["copy_", "_foreach_addcdiv_", "_scaled_dot_product_flash_attention", "cdist", "sigmoid", "index_select"]
    operators = [
        {"name": f"aten::{name}", "calls": 53 - 2 * i, "cpu_ms": 90 / (i + 1), "fraction": 0.21 / (i + 1)}
        | {"device_ms": 5 / (i + 1) if gpu else None}
        for i, name in enumerate(names)
    ]
    kernels = [
        {"name": f"sm90_xmma_gemm_bf16bf16_{i}<float, {i}>", "calls": 12, "cpu_ms": None, "device_ms": 3 / (i + 1)}
        | {"fraction": 0.3 / (i + 1)}
        for i in range(5)
    ]
    waits = [{"operation": "detr_kernels::assignment_scipy", "range": "matching", "per_step": 6.0}]
    waits += [{"operation": "aten::item", "range": "optimizer", "per_step": 1.0}]
    telemetry = {
        name: {"mean": value, "max": 1.1 * value}
        for name, value in (
            ("utilisation_percent", 87.2),
            ("memory_mib", 31_400.0),
            ("power_watts", 512.3),
            ("sm_clock_mhz", 1_755.0),
            ("temperature_celsius", 58.0),
        )
    }
    return {
        "machine": machine(gpu),
        "workload": {
            "name": "detr_fast",
            **MODEL,
            "device": "cuda" if gpu else "cpu",
            "precision": "bf16",
            "compile": True,
            "output": "/where/it/was/first",
            "steps": 3,
            "data": None,
        },
        "steps": 3,
        "step_ms": {"median": step_ms, "q1": 0.99 * step_ms, "q3": 1.01 * step_ms, "runs": 5},
        "profiled_step_ms": {"median": 1.05 * step_ms, "q1": 1.04 * step_ms, "q3": 1.07 * step_ms, "runs": 3},
        "ranges": range_rows(ranges, gpu),
        "idle_fraction": 0.0413 if gpu else None,
        "synchronizations_per_step": 0.0 if gpu else 7.0,
        "synchronizations": [] if gpu else waits,
        "launches_per_step": 1432.0,
        "launch_kind": "kernel launches" if gpu else "operators",
        "operators": operators,
        "kernels": kernels if gpu else [],
        "memory": memory_block(ranges, gpu, 24_310.5 if gpu else 1187.3),
        "gpu": telemetry | {"energy_joules": 251.4, "throttled": ["power cap"]} if gpu else None,
        "process": {"cpu_seconds_per_step": 0.79, "peak_rss_mib": 1633.7},
        "backends": {
            "precision": "bf16 (the processor multiplies in it)",
            "attention": "sdpa (the default on a CPU)",
            "convolution": "folded (measured to be fastest on this device)",
        },
        "roofline": roofline_block(ranges, 2_310.0, 712.0) if gpu else roofline_block(ranges, 21.4, 1.34),
        "trace_file": "trace.pt.json.gz",
        "trace_mib": 3.2,
    }


def parity_rows(eager: float, factor: float, gradients: int) -> list[dict[str, Any]]:
    quantities = [("block", f"backbone layer{i}") for i in range(1, 5)]
    quantities += [("block", f"encoder {i}") for i in range(6)] + [("block", f"decoder {i}") for i in range(6)]
    quantities += [("output", "logits"), ("output", "boxes"), ("loss", "loss_ce"), ("loss", "loss_bbox")]
    quantities += [("gradient", f"gradient transformer.layers.{i}.weight") for i in range(gradients)]
    quantities += [("match", "matches"), ("update", "weights after one step")]
    rows = []
    for index, (kind, name) in enumerate(quantities):
        eager_error = 0.0 if kind == "match" else eager * (1 + index % 7)
        error = factor * eager_error * (0.6 + 0.05 * (index % 9))
        allowed = 2 * eager_error + 1e-6
        rows.append({"quantity": name, "kind": kind, "error": error, "eager_error": eager_error, "allowed": allowed})
        rows[-1]["close"] = error <= allowed
    return rows


def parity(gradients: int = 40) -> dict[str, Any]:
    random = np.random.default_rng(0)
    scales = {"fp32": 1.3e-6, "fp32 compiled": 1.5e-6, "bf16": 6.1e-3, "bf16 compiled": 6.4e-3}
    variants: list[dict[str, Any]] = [
        {"name": name, "rows": parity_rows(scale, 1.5, gradients)} for name, scale in scales.items()
    ]
    for variant in variants:
        variant["close"] = all(row["close"] for row in variant["rows"])
    exact = random.normal(0, 2, 400)
    logits = {
        name: np.stack([exact, exact + 8 * s * random.normal(size=400)], 1).tolist() for name, s in scales.items()
    }
    histogram = {}
    for name, scale in scales.items():
        counts, edges = np.histogram(np.log10(np.abs(scale * random.normal(size=5000)) + 1e-12), bins=24)
        histogram[name] = {"edges_log10": edges.tolist(), "counts": counts.tolist()}
    falling = [30 * math.exp(-step / 40) + 6 + 0.8 * math.sin(step) for step in range(60)]
    losses = {
        name: [value + 20 * scales.get(name, 0) * math.sin(i) for i, value in enumerate(falling)]
        for name in ("reference", "fp32", "bf16")
    }
    return {
        "machine": machine(gpu=False),
        "workload": {"name": "detr_fast", **MODEL, "device": "cpu"},
        "variants": variants,
        "samples": {name: {"logits": pairs} for name, pairs in logits.items()},
        "error_histogram": histogram,
        "curve": {
            "steps": 60,
            "losses": losses,
            "close": True,
            "message": "fp32 stays within 0.02 % of the reference.",
        },
        "ap": {
            "data": "shapes:64",
            "images": 500,
            "rows": [
                {"name": "reference", "AP": 0.7473, "AP50": 0.9611},
                {"name": "bf16", "AP": 0.7468, "AP50": 0.9608},
            ],
            "classes": [{"name": "circle", "AP": 0.81}, {"name": "star", "AP": None}],
            "close": True,
            "message": "AP differs by at most 0.0005.",
        },
        "close": True,
    }


def write_results(folder: Path, **parts: Any) -> Path:
    """Files of the parts given: `trace` and `parity` as dicts, `ladder` as rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("trace", "parity"):
        if name in parts:
            (folder / f"{name}.json").write_text(json.dumps(parts[name]))
    if "ladder" in parts:
        with (folder / "ladder.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [column(each.name) for each in fields(LadderRow)], restval="")
            writer.writeheader()
            writer.writerows(parts["ladder"])
    return folder
