"""The folder of a run: readable, and the same for the same configuration."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# What a run's folder does not depend on: the same training goes on under another logger or on other devices.
ELSEWHERE = {"hydra", "resume", "logger", "annotation_cache", "cache", "runs", "annotate", "dry"}


DEVICES = ("devices", "num_nodes")  # trainer's: a run goes on with others


def digest(cfg: DictConfig, seeds: bool = True) -> str:
    """Of what a run computes: the same wherever it stands, and, without seeds, for the runs of one configuration."""

    def kept(node: Any) -> Any:
        return {k: kept(v) for k, v in node.items() if seeds or k != "seed"} if isinstance(node, dict) else node

    content = kept(OmegaConf.to_container(cfg, resolve=False))
    content = {k: v for k, v in content.items() if k not in ELSEWHERE}
    if "trainer" in content:
        content["trainer"] = {k: v for k, v in content["trainer"].items() if k not in DEVICES}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def run_dir(root: str, model: str, data: str, loss: str, *, _root_: DictConfig) -> str:
    """A run's folder: readable, and the same for the same configuration, so that the same command goes on with it."""
    name = f"{model}_{data}_{loss}-{digest(_root_)}"
    if _root_.get("resume") is not False:
        return f"{root}/{name}"
    known = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_RUN_ID")  # the same for every rank of a job
    job = next((value for key in known if (value := os.environ.get(key)) and value != "none"), None)
    job = job or (str(os.getppid()) if "RANK" in os.environ else None)
    number = job or next(n for n in range(2, 100_000) if not Path(_root_["runs"], f"{name}-{n}").exists())
    return f"{root}/{name}-{number}"
