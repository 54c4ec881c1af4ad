"""Name a run's model and its folder: readable, and the same for the same configuration."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from var.utils.errors import UserError
from var.utils.files import make_file_name

# Keys that do not change the name: the same training resumes with another logger or evaluation, in another place, on
# other devices.
ELSEWHERE = {
    "hydra", "resume", "logger", "eval", "annotation_cache", "cache", "runs", "annotate", "dry", "show_rows", "export",
}  # fmt: skip
DEVICES = ("devices", "num_nodes", "timeout_hours", "keep_checkpoint")  # of trainer


def hash_config(cfg: DictConfig, seeds: bool = True) -> str:
    """Return a hash of what a run computes. With seeds=False, runs that differ only in seeds have the same hash."""

    def drop_seeds(node: Any) -> Any:
        if seeds or not isinstance(node, dict):
            return node
        return {key: drop_seeds(value) for key, value in node.items() if key != "seed"}

    content = drop_seeds(OmegaConf.to_container(cfg, resolve=False))
    content = {k: v for k, v in content.items() if k not in ELSEWHERE}
    if content.get("data", {}).get("sample", "") is None:  # runs of earlier versions keep their names
        content["data"] = {k: v for k, v in content["data"].items() if k != "sample"}
    source = content.get("data", {}).get("source")
    if isinstance(source, dict) and source.get("revision", "") is None:
        content["data"] = {**content["data"], "source": {k: v for k, v in source.items() if k != "revision"}}
    if isinstance(content.get("loss"), dict) and content["loss"].get("roulette") is False:
        content["loss"] = {k: v for k, v in content["loss"].items() if k != "roulette"}
    if "trainer" in content:
        content["trainer"] = {k: v for k, v in content["trainer"].items() if k not in DEVICES}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def model_name(name: str | None, *, _parent_: DictConfig) -> str:
    """Return `name` if a model's path is the repository that its configuration describes, else a name made of the path.

    Qwen/Qwen3-8B gives qwen3-8b. An exported model is named after its run, and a folder of the hub's cache after its
    repository.
    """
    path = None if OmegaConf.is_missing(_parent_, "path") else _parent_.path
    if path is None or (name is not None and path == _parent_.repository):
        return str(name)
    parts = Path(os.path.abspath(Path(path).expanduser())).parts
    last = parts[-2] if parts[-1] == "model" else parts[-1]
    if len(parts) > 2 and parts[-2] == "snapshots" and "--" in parts[-3]:
        last = parts[-3].rpartition("--")[2]
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower())


def own_key(*, _parent_: DictConfig) -> str:
    """Return the key of the part of the configuration that this is written in, such as `second_reward`."""
    return _parent_._get_full_key(None)


def run_dir(root: str, model: str, data: str, loss: str, *, _root_: DictConfig) -> str:
    """Return the folder of a run. The same command finds it again and resumes; resume=false gives a new number."""
    if not _root_["runs"]:  # the run's folder would be in /
        raise UserError("runs: is empty (unset shell variable?). Set it to the parent of the runs' folders.")
    name = f"{make_file_name(f'{model}_{data}_{loss}')}-{hash_config(_root_)}"
    if _root_.get("resume") is not False:
        return f"{root}/{name}"
    variables = ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_RUN_ID")  # the same for every rank of a job
    job = next((value for key in variables if (value := os.environ.get(key)) and value != "none"), None)
    job = job or (str(os.getppid()) if "RANK" in os.environ else None)
    number = job or next(n for n in range(2, 100_000) if not Path(_root_["runs"], f"{name}-{n}").exists())
    return f"{root}/{name}-{make_file_name(str(number))}"
