"""The keys of train.yaml and eval.yaml and their types, without torch."""

import os
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf

from var.utils.errors import Problems


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The top level of conf/train.yaml, which has the meaning of each."""

    model: Any
    data: Any
    reward: Any
    generate: Any
    sampler: Any
    loss: Any
    optim: Any
    trainer: Any
    strategy: Any
    logger: Any
    eval: Any
    seed: int
    init: str | None
    reward_scale: Literal["raw", "sigmoid", "zscore"]
    adapter: Any
    reference: Literal["stored", "live"]
    annotate: Literal["fill", "error"]
    annotation_cache: str
    cache: str
    runs: str
    resume: bool | str
    dry: bool


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """conf/trainer/default.yaml has the meaning of each."""

    epochs: int
    max_steps: int
    max_seconds: float | None
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Literal["auto"] | int
    num_nodes: int
    precision: Literal["auto", "bf16-mixed", "32-true", "64-true"]
    gradient_clip: float
    log_every_n_steps: int
    checkpoint_every_n_steps: int
    ess_warning: float
    nonfinite: Literal["stop", "skip"]
    profiler: Literal["simple", "pytorch"] | None

    @property
    def gpu(self) -> bool:
        return self.accelerator == "gpu" or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def local(self) -> int:
        """Processes of this machine."""
        if self.devices != "auto":
            return int(self.devices)
        return int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() if self.gpu else 1))

    @property
    def world(self) -> int:
        return self.local * self.num_nodes

    @property
    def arithmetic(self) -> str:
        if self.precision != "auto":
            return self.precision
        return "bf16-mixed" if self.gpu else "32-true"


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    optimizer: Any
    schedule: Any


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    every_n_steps: int | None
    reward: Any
    judge: Any
    judged: int | None
    sampling: Any

    def __post_init__(self) -> None:
        problems = Problems("evaluation while training")
        for name, none in (("every_n_steps", "only before and after training"), ("judged", "all")):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.add(f"eval.{name}", f"must be at least 1, or null ({none}), got {value}")
        problems.check()


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    wandb: Any
    tensorboard: Any


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    project: str
    name: str | None
    offline: bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class TensorBoardSettings:
    name: str


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The top level of conf/eval.yaml, which has the meaning of each."""

    model: Any
    data: Any
    more: Any
    reward: Any
    generate: Any
    sampler: Any
    judge: Any
    benchmarks: Any
    seed: int
    seeds: list[int]
    init: str | None
    answers: str | None
    reference: str | None
    held_out: bool | list[str]
    prompts: int | None
    against: Literal["reference", "chosen"]
    judged: int | None
    averages: Any
    second_reward: Any
    precision: Literal["float32", "bfloat16"]
    annotation_cache: str
    cache: str
    out: str


def values(node: DictConfig) -> dict[str, Any]:
    """A part of the configuration as plain values."""
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def known(reader: Any, node: DictConfig) -> dict[str, Any]:
    """The values of a part that its dataclass reads; the others are for references."""
    names = {field.name for field in fields(reader)}
    return {name: value for name, value in values(node).items() if name in names}
