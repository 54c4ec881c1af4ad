"""The keys of conf/train.yaml and conf/eval.yaml and their types. Importing this module does not import torch."""

import os
import re
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from var.utils.errors import Problems

MEMORY = re.compile(r"([0-9.]+) ?(GiB|GB)")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The top level of conf/train.yaml."""

    model: Any  # the policy before training
    data: Any  # rows, batches and the validation split
    reward: Any  # scores responses
    generate: Any  # how training responses are sampled
    sampler: Any  # what samples them
    loss: Any
    optim: Any  # optimizer and schedule
    trainer: Any  # length, devices and precision
    strategy: Any  # how devices share the work
    logger: Any
    eval: Any  # validation
    seed: int
    init: str | None  # folder of a finished run to start from
    reward_scale: Literal["raw", "sigmoid", "zscore"]  # the scale in which λ is measured
    adapter: Any  # LoRA, or None to train all parameters
    reference: Literal["cached", "live"]  # reference log-probabilities: from the cache, or computed in every step
    annotate: Literal["fill", "error"]  # whether to compute missing annotations
    annotation_cache: str  # folder of responses, rewards and reference log-probabilities
    cache: str  # folder of converted models, rows and tokens
    runs: str  # parent of the runs' folders
    resume: bool | str  # "auto", False, or the path of a checkpoint
    dry: bool  # print what the run needs, and stop
    show_rows: int  # print this many rows as tokens, and stop; 0: train
    export: dict[str, Any] | None = None  # where the trained model goes; annotate.py has a file of this name instead


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The group export."""

    push_to_hub: str | None  # owner/name on the hub
    private: bool  # whether a repository that is created is private


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The group trainer."""

    epochs: int  # passes over the data
    max_steps: int  # optimizer steps; -1: those of all epochs
    max_seconds: float | None  # of sampling, scoring and training
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Literal["auto"] | int  # per machine
    device_memory: str | None  # of each GPU, as in 80GiB; None: that of the GPUs found
    num_nodes: int  # machines
    precision: Literal["auto", "bf16-mixed", "32-true", "64-true"]
    gradient_clip: float  # maximum gradient norm; 0: no clipping
    log_every_n_steps: int  # optimizer steps
    checkpoint_every_n_steps: int  # optimizer steps
    ess_warning: float  # effective sample size, as a fraction of a step's sequences, below which to warn once
    nonfinite: Literal["stop", "skip"]  # what to do if a gradient is not finite
    profiler: Literal["simple", "pytorch"] | None
    keep_checkpoint: bool  # whether to keep the resumable state of a finished run
    export_dtype: Literal["base", "float32"]  # of the exported model; base: that of the base model's files
    timeout_hours: float  # how long a process waits for the others before it gives up
    deterministic: bool  # use only deterministic GPU kernels

    @property
    def timeout(self) -> timedelta:
        """How long a process waits for the others."""
        return timedelta(hours=self.timeout_hours)

    def __post_init__(self) -> None:
        problems = Problems("invalid trainer settings")
        if self.device_memory is not None and not MEMORY.fullmatch(str(self.device_memory)):
            problems.add("trainer.device_memory", f"expected a size such as 80GiB, got {self.device_memory!r}")
        least = {
            "epochs": 1, "max_steps": -1, "devices": 1, "num_nodes": 1, "gradient_clip": 0, "log_every_n_steps": 1,
            "checkpoint_every_n_steps": 1, "ess_warning": 0, "timeout_hours": 0,
        }  # fmt: skip
        if self.max_steps == 0:
            problems.add("trainer.max_steps", "0 steps train nothing; -1 trains for all epochs")
        for name, least_value in least.items():
            value = getattr(self, name)
            if value != "auto" and not value >= least_value:
                problems.add(f"trainer.{name}", f"must be at least {least_value}, got {value}")
        problems.check()

    @property
    def device_bytes(self) -> float | None:
        """`device_memory` in bytes."""
        if self.device_memory is None:
            return None
        found = MEMORY.fullmatch(self.device_memory)
        assert found is not None
        return float(found[1]) * (2**30 if found[2] == "GiB" else 10**9)

    @property
    def gpu(self) -> bool:
        """Whether the run uses GPUs, found or given by `device_memory`."""
        import torch

        found = torch.cuda.is_available() or self.device_memory is not None
        return self.accelerator == "gpu" or (self.accelerator == "auto" and found)

    @property
    def local(self) -> int:
        """Number of processes on this machine."""
        import torch

        if self.devices != "auto":
            return int(self.devices)
        return int(os.environ.get("LOCAL_WORLD_SIZE", max(1, torch.cuda.device_count()) if self.gpu else 1))

    @property
    def world(self) -> int:
        """Number of processes on all machines."""
        return self.local * self.num_nodes

    @property
    def arithmetic(self) -> str:
        """The precision, with "auto" resolved."""
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if self.gpu else "32-true"


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The group optim."""

    optimizer: Any  # a partial of a torch.optim.Optimizer
    schedule: Any  # the learning rate over optimizer steps


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """The group eval: validation on sampled responses."""

    enabled: bool  # whether to evaluate at all
    every_n_steps: int | None  # None: only before and after training
    reward: Any  # None: the run's
    judge: Any  # compares with the initial policy
    judged: int | None  # number of prompts that the judge compares; None: all
    sampling: Any

    def __post_init__(self) -> None:
        problems = Problems("invalid evaluation settings")
        for name, none in (("every_n_steps", "only before and after training"), ("judged", "all")):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.add(f"eval.{name}", f"must be at least 1, or null ({none}), got {value}")
        problems.check()


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """The group logger. metrics.csv is always written."""

    wandb: Any  # WandbSettings or None
    tensorboard: Any  # TensorBoardSettings or None
    mlflow: Any  # MLflowSettings or None


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """Weights & Biases."""

    project: str
    name: str | None  # None: the name of the run's folder
    offline: bool | Literal["auto"]  # auto: online if there is a key


@dataclass(frozen=True, kw_only=True)
class TensorBoardSettings:
    """TensorBoard."""

    name: str


@dataclass(frozen=True, kw_only=True)
class MLflowSettings:
    """MLflow."""

    experiment: str
    name: str | None  # None: the name of the run's folder
    tracking_uri: str | None  # None: MLFLOW_TRACKING_URI, or a database next to the run's folder


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The top level of conf/eval.yaml."""

    model: Any  # the policy, unless init or answers is given
    data: Any  # prompts
    more: Any  # further data sets by name
    reward: Any  # None: only lengths, judge and benchmarks
    generate: Any  # how responses are sampled
    sampler: Any
    judge: Any  # None: no win rate
    benchmarks: Any  # None: no benchmarks
    seed: int  # of drawing prompts and of the validation split
    seeds: list[int]  # of sampling
    init: str | None  # folder of the evaluated run or model
    answers: str | None  # file of responses to evaluate instead
    reference: str | None  # model to compare with
    held_out: bool | list[str]  # use only the validation split, of all or of these data sets
    prompts: int | None  # number per subset; None: all
    against: Literal["reference", "chosen"]  # what the judge compares the responses with
    judged: int | None  # number of judged prompts per subset; None: all
    averages: Any  # lists of subsets by name
    second_reward: Any  # None: only the reward
    devices: int | Literal["auto"]  # processes on this machine; auto: one per GPU, or one on a CPU
    precision: Literal["float32", "bfloat16"]  # of sampling, scoring and benchmarks
    annotation_cache: str  # folder of responses, rewards and reference log-probabilities
    cache: str  # folder of converted models, rows and tokens
    out: str  # parent of the results' folders


def to_dict(node: DictConfig) -> dict[str, Any]:
    """Convert a part of the configuration to plain values."""
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def pick_fields(settings: Any, node: DictConfig) -> dict[str, Any]:
    """Return the values of a part that are fields of its dataclass. The others exist for interpolations."""
    names = {field.name for field in fields(settings)}
    return {name: value for name, value in to_dict(node).items() if name in names}
