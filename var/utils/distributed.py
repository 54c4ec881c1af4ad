"""The rank of this process among those of the job."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def set_rank_variables() -> None:
    """Set torch's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, …) in a process of SLURM or submitit.

    torchrun sets them itself.
    """
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        # All GPUs of the node stay visible to each of its processes; Lightning assigns them.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    elif "SLURM_NTASKS" in os.environ and "RANK" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # not in an interactive allocation, whose shell has the variable too
            slurm = SLURMEnvironment()
            ranks: dict[str, Any] = {
                "RANK": slurm.global_rank(),
                "LOCAL_RANK": slurm.local_rank(),
                "WORLD_SIZE": slurm.world_size(),
            }
            ranks |= {"LOCAL_WORLD_SIZE": os.environ.get("SLURM_NTASKS_PER_NODE", 1), "NODE_RANK": slurm.node_rank()}
            meeting = {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": slurm.main_port}
            os.environ |= {name: str(value) for name, value in (ranks | meeting).items()}


@dataclass
class Ranks:
    """This process among those of the job. Without torch.distributed it is the only one."""

    rank: int = 0
    """Of this process, 0..world-1."""
    world: int = 1
    """The number of processes."""
    barrier: Callable[[], None] = lambda: None
    """Waits for all processes."""

    @classmethod
    def current(cls) -> "Ranks":
        """Return this process's rank in the job that runs now."""
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            dist = torch.distributed
            return cls(dist.get_rank(), dist.get_world_size(), dist.barrier)
        return cls()

    def deal(self, items: int) -> list[int]:
        """Return the indices of this process's part of `items` items."""
        return list(range(self.rank, items, self.world))

    def collect(self, own: Sequence[T]) -> list[T]:
        """Return the results of all processes for items that were dealt by `deal`, in the order of the items.

        All processes call this together.
        """
        if self.world == 1:
            return list(own)
        import torch

        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, list(own))
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]
