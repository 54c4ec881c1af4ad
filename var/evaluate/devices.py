"""The processes of an evaluation: one per GPU. They share the prompts, and the first one writes the results."""

import os
import sys
from datetime import timedelta

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from var.utils.distributed import Ranks, bind_device
from var.utils.errors import Problems
from var.utils.signals import follow_parent

# The first process may judge, or run benchmarks' programs, for hours while the others wait.
TIMEOUT = timedelta(days=7)


def count_processes(cfg: DictConfig) -> int:
    """Return how many processes to start for `devices`; 1 if a launcher has started this one.

    Raise one UserError for all combinations of devices that cannot work.
    """
    devices, gpus = cfg.devices, torch.cuda.device_count()
    tensor_parallel = cfg.sampler.get("tensor_parallel_size", 1)  # of vLLM, whose engine then takes several GPUs
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if "RANK" in os.environ else None
    processes = devices if devices != "auto" else launched or (1 if tensor_parallel > 1 else max(gpus, 1))
    problems = Problems("these devices cannot be used")
    if processes < 1:
        problems.add("devices", f"expected at least 1, or auto, got {devices}")
    if launched is not None and processes != launched:
        problems.add("devices", f"{devices}, but the launcher started {launched} processes. Leave it at auto.")
    if launched is None and gpus and processes > gpus:
        problems.add("devices", f"{devices}, but this machine has {gpus} GPUs")
    if processes > 1 and tensor_parallel > 1:
        problems.add(
            "sampler.tensor_parallel_size",
            f"{tensor_parallel}, but each of {processes} processes has one GPU. Set it to 1, or devices=1.",
        )
    elif gpus and tensor_parallel > gpus:
        problems.add("sampler.tensor_parallel_size", f"{tensor_parallel}, but this machine has {gpus} GPUs")
    problems.check()
    return processes if launched is None else 1


def launch(processes: int) -> None:
    """Run this command in several processes by torchrun. Exit with 1 if one of them fails."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--standalone", f"--nproc-per-node={processes}", sys.argv[0], *_arguments()])
    except ChildFailedError:  # the process has printed its error
        sys.exit(1)


def _arguments() -> list[str]:
    """Return the arguments of this command; in a sweep, those of the current job."""
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return sys.argv[1:]
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return [*(f"--config-dir={folder}" for folder in folders), *hydra.overrides.task]


def join_processes() -> Ranks:
    """Bind this process to its GPU and connect it to the others, if there are any. Return its rank.

    The processes exchange texts and numbers through the CPU only, so gloo connects them on any device.
    """
    bind_device()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        follow_parent()  # the launcher, which may be killed
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
    return Ranks.current()
