"""Train a tabular policy by any loss of `conf/loss`, on fresh responses of π_ref or of the policy itself."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from var.config.check import FOLDER
from var.requirements import Rollout, TokenValues, find
from var.testbed.policies import TablePolicy, TabularPolicy
from var.testbed.rows import Rows, make_rows, pack_rows
from var.testbed.world import World

POOL = 16  # optimizer steps whose rows are drawn, and weighted, together


def list_losses() -> list[str]:
    """Return the names of the complete configurations in `conf/loss`."""
    files = sorted((Path(FOLDER) / "loss").glob("[!_]*.yaml"))
    return [file.stem for file in files if "_target_: ???" not in file.read_text()]


@cache
def read_config(name: str) -> DictConfig:
    """Return `conf/loss/{name}.yaml` merged with its bases."""
    with initialize_config_dir(str(Path(FOLDER) / "loss"), version_base="1.3"):
        return compose(name)


def load_loss(name: str, **settings: Any) -> Any:
    """Return the loss of `conf/loss/{name}.yaml`. `settings` override it, by dotted key."""
    config = deepcopy(read_config(name))
    for key, value in settings.items():
        OmegaConf.update(config, key, value, force_add=True)
    return instantiate(config)


def make_policy(world: World, loss: Any, kind: type[TabularPolicy] = TablePolicy) -> TabularPolicy:
    """Return a policy at π_ref, with a critic if the loss needs one."""
    return kind(world, find(loss.requires, TokenValues) is not None)


def sample_rows(
    world: World,
    loss: Any,
    policy: TabularPolicy,
    generator: torch.Generator,
    *,
    answers: int,
    sequences: int,
    **options: Any,
) -> Iterator[Rows]:
    """Yield the rows of one optimizer step after the other: new responses to uniformly drawn prompts.

    They are responses of π_ref, or of the policy if the loss is online. `answers` is K, `sequences` the rows per step,
    a multiple of K unless `best` keeps one response of K. `options` are arguments of `make_rows`.
    """
    if sequences % answers and not options.get("best"):
        raise ValueError(f"sequences={sequences} must be a multiple of answers={answers}")
    online = find(loss.requires, Rollout)
    questions = (sequences if options.get("best") else sequences // answers) * (1 if online else POOL)
    while True:
        prompts = torch.randint(len(world), (questions,), generator=generator)
        asked = prompts[:, None].expand(-1, answers)
        responses = world.sample(asked, generator, policy.logps() if online else None)
        rows = make_rows(world, loss, prompts, responses, generator, **options)
        for index in torch.arange(len(rows) - len(rows) % sequences).split(sequences):
            yield rows.take(index)


def compute_loss(world: World, loss: Any, rows: Rows, policy: TabularPolicy) -> Tensor:
    """Return the loss of one optimizer step, with a gradient. The current policy counts as the one that sampled."""
    logps, values = policy(rows.prompts, rows.responses)
    old_values = None if values is None else values.detach()
    packed = pack_rows(world, loss, rows, policy)
    return loss(logps, replace(packed, old_logps=logps.detach(), values=values, old_values=old_values))[0]


def train(
    policy: TabularPolicy,
    world: World,
    loss: Any,
    rows: Iterator[Rows],
    *,
    steps: int,
    learning_rate: float,
    decay: bool = True,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Train the policy by Adam.

    With `decay` the learning rate falls linearly to 0, so that the policy ends at the objective's own fixed point.
    `watch` is called with the step and its loss before each step, and with NaN after the last step.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps if decay else 1)
        value = compute_loss(world, loss, next(rows), policy)
        if watch is not None:
            watch(step, value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    if watch is not None:
        watch(steps, math.nan)
