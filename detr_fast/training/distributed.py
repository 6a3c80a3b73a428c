"""Distributed training as torchrun starts it: rank and world size, sums over all ranks, gradients averaged by DDP."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr_fast.config import UserError
from detr_fast.training.snapshot import batch_norm_statistics

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer has lost a process; the others then stop with torch's message."""


@dataclass(frozen=True)
class World:
    """This process's rank among `size`; `local_rank` counts on its own node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum `value` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, here: bool, device: torch.device) -> bool:
        """Tell whether `here` holds in any process; all have to call it, and the host waits for the answer."""
        return bool(self.sum(torch.tensor(float(here), device=device)) > 0)

    def broadcast(self, value: Value) -> Value:
        """Return the main process's `value` in all processes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, or a world of one.

    Raises UserError where it cannot form.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"Could not join {size} processes: {error}. Start them with torchrun.") from error
    try:
        yield world
    finally:
        dist.destroy_process_group()


def data_parallel(network: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Wrap `network` in DDP, which averages gradients during the backward pass; with one process return it as it is."""
    if world.size == 1:
        return network
    devices = [world.local_rank] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def all_reduce_later(network: nn.Module, later: bool) -> AbstractContextManager[None]:
    """Leave out the all-reduce of a backward pass, where `later`: a later one will average these gradients too."""
    if later and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


def share_buffers(network: nn.Module, world: World) -> None:
    """Broadcast the main rank's batch norm statistics, as each rank has those of its own batches."""
    if world.size > 1:
        for buffer in batch_norm_statistics(network):
            dist.broadcast(buffer, 0)
