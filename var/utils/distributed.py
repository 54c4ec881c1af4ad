"""Ranks: this process among those of the job."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def set_rank_variables() -> None:
    """Give a process that SLURM or submitit started its rank, the number of ranks and where they meet by torch's names
    (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, …), as torchrun has done for its own."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        # the node's GPUs stay visible to each of its processes: Lightning gives each its own
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    elif "SLURM_NTASKS" in os.environ and "RANK" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # not within an interactive allocation, whose shell has the variable as well
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
    """This process among those of the job; alone where torch.distributed is not started."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None

    @classmethod
    def current(cls) -> "Ranks":
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            dist = torch.distributed
            return cls(dist.get_rank(), dist.get_world_size(), dist.barrier)
        return cls()
