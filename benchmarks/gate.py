"""The gate before the clock: a model is timed only if it computes what the plain reference computes."""

from pathlib import Path

import torch
from detr_profiling.baselines.build import build_baseline
from detr_profiling.comparison.judgement import judge, targets_of, worst
from detr_profiling.observation import Observation
from detr_profiling.workload import Workload, WorkloadOptions

from benchmarks.clock import NOT_COMPARABLE, Verdict


class PlainObservations:
    """Keeps what the plain reference computes from a workload's batch, in float64 and eager in its precision.

    Each observation is made once a session and lies in a file since then, so that a benchmark's memory is its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def judge(self, workload: Workload, tf32: bool) -> Verdict:
        """Compare a workload with the reference; `tf32`: as it was built with, which must still hold.

        Raises AssertionError where it is further from float64 than twice the eager error allows.
        """
        if workload.observe is None:
            return NOT_COMPARABLE
        options = workload.options
        exact = self.load(options.but(precision="fp32"), tf32, torch.float64)
        eager = self.load(options, tf32, torch.float32)
        return verdict_of(workload.observe(), exact | targets_of(options), eager)

    def load(self, options: WorkloadOptions, tf32: bool, dtype: torch.dtype) -> Observation:
        values = options.to_dict()
        words = [values[name] for name in ("mode", "model", "size", "batch_size", "objects", "precision")]
        path = self.folder / "-".join(map(str, (*words, tf32, dtype)))
        if not path.exists():
            observe = build_baseline("reference", options, dtype).observe
            assert observe is not None
            torch.save(observe(), path)
        return torch.load(path)


def verdict_of(found: Observation, exact: Observation, eager: Observation) -> Verdict:
    """Return the verdict. Raises AssertionError, naming the quantities, where `found` is too far from `exact`."""
    rows = judge(found, exact, eager)
    wrong = [f"{row.quantity}: error {row.error:.3g}, allowed {row.allowed:.3g}" for row in rows if not row.close]
    assert not wrong, f"{len(wrong)} of {len(rows)} quantities are wrong, such as {'; '.join(wrong[:3])}"
    row = worst(rows)
    return Verdict(row.quantity, row.error, row.allowed)
