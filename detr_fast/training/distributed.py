"""Several processes, as torchrun starts them: who we are, and sums over all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from detr_fast.config import UserError

Value = TypeVar("Value")

TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer has lost a process; the others then stop with torch's message."""


@dataclass(frozen=True)
class World:
    """This process among `size`; `local_rank` counts on its own machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """`value` added up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def broadcast(self, value: Value) -> Value:
        """Return the main process's `value`, on all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """The process group torchrun describes in the environment, or a world of one. Raises UserError where it cannot
    form."""
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
