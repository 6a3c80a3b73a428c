"""What must hold before a model is timed: it computes what the plain reference computes."""

from dataclasses import replace
from pathlib import Path

import torch
from detr_profiling.judgement import judge, targets_of, worst
from detr_profiling.observation import Observation, observe_model
from detr_profiling.peers import build_peer
from detr_profiling.workload import Workload, WorkloadOptions, build_workload, initial_model, make_batch

from benchmarks.clock import NOT_COMPARABLE, Verdict
from detr_fast.runtime import choose_runtime
from detr_fast.training.criterion import build_criterion


class PlainObservations:
    """What plain code computes from a workload's batch, in float64 and eager in the workload's own precision.

    Each is made once a session and lies in a file since then, so that a benchmark's memory is its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def judge(self, workload: Workload, tf32: bool) -> Verdict:
        """`tf32`: what the workload was built with, which must still hold. Raises AssertionError where it is further
        from float64 than twice the eager error allows."""
        if workload.observe is None:
            return NOT_COMPARABLE
        options = workload.options
        exact = self.load(replace(options, precision="fp32"), tf32, torch.float64)
        eager = self.load(options, tf32, torch.float32)
        return verdict_of(workload.observe(), exact | targets_of(options), eager)

    def load(self, options: WorkloadOptions, tf32: bool, dtype: torch.dtype) -> Observation:
        words = (options.mode, options.model, options.size, options.batch_size, options.objects, options.precision)
        path = self.folder / "-".join(map(str, (*words, tf32, dtype)))
        if not path.exists():
            torch.save(observe_plain(options, dtype), path)
        return torch.load(path)


def verdict_of(found: Observation, exact: Observation, eager: Observation) -> Verdict:
    """Raises AssertionError, naming the quantities, where `found` is too far from `exact`."""
    rows = judge(found, exact, eager)
    wrong = [f"{row.quantity}: error {row.error:.3g}, allowed {row.allowed:.3g}" for row in rows if not row.close]
    assert not wrong, f"{len(wrong)} of {len(rows)} quantities are wrong, such as {'; '.join(wrong[:3])}"
    row = worst(rows)
    return Verdict(row.quantity, row.error, row.allowed)


def observe_plain(options: WorkloadOptions, dtype: torch.dtype) -> Observation:
    """By the plain reference; of detr_tiny, which it does not have, by our own model in DETR's own order of operations,
    whose outputs are float32 whatever `dtype` is."""
    if options.model != "detr_tiny":
        observe = build_peer("reference", options, dtype).observe
        assert observe is not None
        return observe()
    plain = replace(options, compile=False, kernels="ref", attention="ref")
    if dtype == torch.float64:
        return observe_in_float64(plain)
    observe = build_workload(plain).observe
    assert observe is not None
    return observe()


def observe_in_float64(options: WorkloadOptions) -> Observation:
    runtime = choose_runtime(options)
    model = runtime.place(initial_model(options)).double()
    criterion = build_criterion(model.config.num_classes)
    batch = make_batch(options.observed(), model.config.num_classes).to(runtime.device)
    with torch.set_grad_enabled(options.mode == "training"):
        return observe_model(model, lambda images, mask: model(images.double(), mask), criterion, batch, runtime)
