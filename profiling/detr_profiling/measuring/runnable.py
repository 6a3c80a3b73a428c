"""The backends with which an operation can run for a workload: the ladder gives each a row, `tune` tries each."""

from functools import cache

import torch
from detr_kernels import Facts, Operation

from detr_fast.config import ModelConfig
from detr_fast.model.backends import operations_of
from detr_fast.model.detr import DETR
from detr_fast.runtime import choose_device, choose_precision
from detr_profiling.workload import WorkloadOptions


def runnable_backends(operation: Operation, options: WorkloadOptions) -> list[str]:
    """List the backends of `operation` that can run for a workload, in the order in which `auto` prefers them.

    The list is empty where the workload's model does not have the operation, or not in its mode. Triton is left out on
    a CPU, where it is an interpreter.
    """
    facts = facts_of(options)
    if operation.mode not in (None, options.mode) or operation.name not in model_operations(options.network.config()):
        return []
    names = [backend.name for backend in operation.backends if backend.why_not(facts) is None]
    return [name for name in names if name != "triton" or facts.device.type != "cpu"]


def facts_of(options: WorkloadOptions) -> Facts:
    """Describe where and how the operations of a workload run."""
    device, _ = choose_device(options.runtime.device)
    config, training = options.network.config(), options.mode == "training"
    return Facts(
        device,
        choose_precision(options.runtime.precision, device)[0],
        training,
        config.dropout if training else 0.0,
        config.hidden_dim // config.num_heads,
        bool(options.runtime.compile),
    )


@cache
def model_operations(config: ModelConfig) -> frozenset[str]:
    """Name the operations of a model, which is built without memory."""
    with torch.device("meta"):
        return frozenset(operations_of(DETR(config)))
