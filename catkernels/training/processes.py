"""The processes that train one model together."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from catkernels.torch_state.device import best_device

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """One process among those that train; by default the only one.

    Attributes:
        rank: this process, 0 .. count - 1.
        count: how many they are.
        device: where this one computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=best_device)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' ``values``."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns in the first process, which alone does it.

        Raises:
            OSError, ValueError: what ``work`` raised there, in every process.
        """
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as raised:
                outcome[1] = raised
        if self.count > 1:
            dist.broadcast_object_list(outcome)
        result, error = outcome
        if error is not None:
            raise error
        return cast(Result, result)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; without it, this one works alone.

    What was wrapped for these processes must be out of reach when the context ends. Python may
    only end after the process group's threads: one that still lets go of a tensor while the
    interpreter is taken down aborts the process.

    Raises:
        ValueError: the machine has too few devices for them.
    """
    if not dist.is_torchelastic_launched():
        yield Processes()
        return
    device = best_device()
    if device.type != "cpu":
        devices = torch.get_device_module(device)
        index, count = dist.get_node_local_rank(), devices.device_count()
        if index >= count:
            raise ValueError(
                f"torchrun started more than {count} processes on a machine with {count} "
                f"{device.type} devices: start at most one for each"
            )
        device = torch.device(device.type, index)
        devices.set_device(device)
    # DistributedDataParallel imports it, and where a group exists by then it is held for good, as
    # the default of the functions' arguments
    import_module("torch.distributed.nn.functional")
    dist.init_process_group()
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
    finally:
        # DistributedDataParallel lies in cycles of references, and holds the group
        gc.collect()
        dist.destroy_process_group()
