"""Findings of a comparison with the reference so far, as parity.json holds them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr_fast.files import write_text
from detr_profiling.comparison.judgement import Row
from detr_profiling.comparison.own_outputs import equal_matches
from detr_profiling.comparison.variants import Variant
from detr_profiling.observation import Observation

MOST_SAMPLES = 500
EDGES_LOG10 = np.arange(-12, 2.25, 0.25)


@dataclass
class ParityRecord:
    """Holds what was found; it is written anew after each part, so that a run that is stopped leaves it."""

    path: Path
    machine: dict[str, Any]
    workload: dict[str, Any]
    variants: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Variant to why it does not run here."""
    samples: dict[str, Any] = field(default_factory=dict)
    error_histogram: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] | None = None
    ap: dict[str, Any] | None = None
    finished: bool = False

    @property
    def close(self) -> bool:
        parts = [part for part in (*self.variants, self.curve, self.ap) if part is not None]
        return bool(parts) and all(part["close"] for part in parts)

    def add(self, variant: Variant, found: Observation, rows: list[Row], reference: Observation) -> None:
        close, exact = all(row.close for row in rows), reference["logits"][-len(found["logits"]) :]
        matches = equal_matches(found, reference) if "matches" in found else None
        entry = {"name": variant.name, "rows": [row.to_dict() for row in rows], "close": close}
        self.variants.append(entry | {"equal_matches": matches})
        self.samples[variant.name] = {"logits": sampled(exact, found["logits"])}
        self.error_histogram[variant.name] = error_histogram(exact, found["logits"])

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "path"} | {"close": self.close}

    def write(self) -> None:
        write_text(self.path, json.dumps(self.to_dict(), allow_nan=False))


def sampled(exact: torch.Tensor, found: torch.Tensor) -> list[list[float | None]]:
    """Sample at most 500 pairs of the exact value and the one found, None where it is not finite."""
    chosen = torch.randperm(exact.numel(), generator=torch.Generator().manual_seed(0))[:MOST_SAMPLES]
    pairs = torch.stack([side.double().flatten()[chosen] for side in (exact, found)], 1)
    return [[value if np.isfinite(value) else None for value in pair] for pair in pairs.tolist()]


def error_histogram(exact: torch.Tensor, found: torch.Tensor) -> dict[str, list[float]]:
    """Count how many values are off by how much; what is less than the first edge counts to the first bin."""
    errors = (found.double() - exact.double()).abs().flatten()
    logarithms = errors[errors.isfinite()].clamp(min=10.0 ** EDGES_LOG10[0]).log10().numpy()
    counts, _ = np.histogram(logarithms, EDGES_LOG10)
    (filled,) = np.nonzero(counts)
    shown = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0)
    return {"edges_log10": EDGES_LOG10[shown.start : shown.stop + 1].tolist(), "counts": counts[shown].tolist()}
