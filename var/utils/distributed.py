"""The rank of this process among those of the job, and its device."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from var.utils.errors import UserError

T = TypeVar("T")
WAIT = timedelta(days=1)  # for which a rank waits while another one annotates; the libraries' default is 10 minutes


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


def bind_device() -> str:
    """Make the GPU of this process its current device, before anything is loaded, and return its name.

    A bare "cuda" then means this GPU. Without GPUs return "cpu". If the launcher shows each process its own GPU only,
    that is the first one of each.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if count > 1 and local >= count:
        raise UserError(
            f"{local + 1} or more processes were started on this machine, and {count} GPUs are visible. Start at most "
            "one process per GPU."
        )
    device = f"cuda:{local if count > 1 else 0}"
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(timeout: timedelta = WAIT) -> Iterator[None]:
    """Join the processes that the launcher started, if there are several, for the `with` block.

    Waiting for other ranks uses gloo, on GPUs too. A model that is sharded over GPUs uses NCCL.
    """
    import torch

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout
        )
    yield
    if several:  # not after an error: other ranks would wait for each other's end
        torch.distributed.destroy_process_group()


@dataclass
class Ranks:
    """This process among those of the job. Without torch.distributed it is the only one."""

    rank: int = 0
    """Of this process, 0..world-1."""
    world: int = 1
    """The number of processes."""
    barrier: Callable[[], None] = lambda: None
    """Waits for all processes."""
    any: Callable[[bool], bool] = lambda value: value
    """Returns whether the value is true on any process. Nobody waits for a GPU."""

    @classmethod
    def current(cls) -> "Ranks":
        """Return this process's rank in the job that runs now. All ranks must call it together."""
        import torch

        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        dist = torch.distributed
        group = dist.new_group(backend="gloo", timeout=WAIT)

        def barrier() -> None:
            work = dist.barrier(group, async_op=True)
            while not work.is_completed():  # in Python, so that a signal ends the process while it waits
                time.sleep(0.01)
            work.wait()

        def any_rank(value: bool) -> bool:
            flag = torch.tensor(float(value))
            dist.all_reduce(flag, dist.ReduceOp.MAX, group)
            return bool(flag)

        return cls(dist.get_rank(), dist.get_world_size(), barrier, any_rank)

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
