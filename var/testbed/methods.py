"""The objectives of the package as the enumerable world runs them: each through its own file in conf/loss, over its own
knob; and the loop that trains a tabular policy by one.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from var.config.check import FOLDER
from var.requirements import Need
from var.testbed.policies import Labels, Rows, TabularPolicy, loss_on, make_rows
from var.testbed.world import World

DATA_KNOBS = ("K", "λ")  # no settings of the loss


@dataclass(frozen=True, kw_only=True)
class Method:
    """name: as tables show it. loss: its file, with `options` over it. knob: what is turned, through `values`.

    factor: λ of RLHF is so many times the knob; None: the objective names none. answers: K for each question. best:
    train on the best of them alone. labels: of pairs. sigmoid: the loss sees rewards through a sigmoid, as it must not
    see negative ones. path: it stops nowhere, so the knob is how long one trains. few: runs in the second regime too.
    """

    name: str
    loss: str
    knob: str | None = None
    values: tuple[Any, ...] = (None,)
    factor: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    answers: int = 1
    best: bool = False
    labels: Labels = "reward"
    sigmoid: bool = False
    path: bool = False
    few: bool = True

    @property
    def online(self) -> bool:
        """Trains on answers of the policy itself."""
        return Need.ROLLOUT in self.build(self.values[0]).needs

    @property
    def family(self) -> str:
        """By what the loss needs."""
        if self.online:
            return "online"
        needs = self.build(self.values[0]).needs
        if needs & {Need.PAIRS, Need.GROUPS, Need.DESIRABLE}:
            return "preferences"
        return "A-LoL and its baselines" if self.sigmoid or Need.ADVANTAGES in needs else "SFT and VAR"

    def build(self, value: Any = None) -> Any:
        """The loss, at a value of the knob."""
        turned = {self.knob: value} if self.knob not in (None, *DATA_KNOBS) else {}
        return load(self.loss, **{**self.options, **turned})

    def answers_at(self, value: Any) -> int:
        """K, which rejection sampling has for its knob."""
        return int(value) if self.knob == "K" else self.answers

    def rewards(self, world: World) -> Tensor:
        """[P, Y], as the loss sees them."""
        return world.rewards.sigmoid() if self.sigmoid else world.rewards

    def weights(self, world: World, value: Any) -> Tensor | None:
        """[P, Y] e^{r/λ} / Z(x), exactly, where λ is the knob and the data brings the weight."""
        return (world.optimum(value) - world.logps).exp() if self.knob == "λ" else None

    def temperature(self, value: Any) -> float | None:
        """λ of RLHF."""
        return None if self.factor is None else self.factor * value


def load(name: str, **options: Any) -> Any:
    """A loss from conf/loss, some settings overridden by dotted key."""
    config = OmegaConf.load(Path(FOLDER) / "loss" / f"{name}.yaml")
    for key, value in options.items():
        OmegaConf.update(config, key, value, force_add=False)
    return instantiate(config)


LAMBDAS = (0.5, 1.0, 2.0)


REWARD = {"temperature_unit": "reward"}


def var(name: str, loss: str, answers: int, **options: Any) -> Method:
    """One of VAR's estimators over λ."""
    return Method(name=name, loss=loss, knob="temperature", values=LAMBDAS, factor=1.0, answers=answers,
                  options={**REWARD, **options})  # fmt: skip


def pairs(loss: str, *values: float, **options: Any) -> Method:
    """A preference loss over β."""
    return Method(name=options.pop("name", loss), loss=loss, knob="beta", values=values, answers=2, options=options)


METHODS: tuple[Method, ...] = (
    Method(name="sft", loss="sft"),
    Method(name="rejection sampling", loss="sft", knob="K", values=(2, 4, 16), best=True),
    Method(name="weighted, exact Z", loss="weighted", knob="λ", values=LAMBDAS, factor=1.0),
    var("var", "var", 1),
    var("var_sum", "var_sum", 1),
    var("var_own", "var_own", 1),
    var("var_prompt", "var_prompt", 4),
    var("var_grouped", "var_grouped", 4),
    var("var_value", "var_value", 4),
    var("var_value, no cap", "var_value", 4, **{"estimator.cap": 1e9}),
    var("var_global", "var_global", 1),
    var("var_sampled", "var_sampled", 1),
    var("var_sampled, no cap", "var_sampled", 1, **{"estimator.cap": None}),
    pairs("dpo", 0.3, 1.0, 3.0),
    Method(name="dpo, Bradley-Terry labels", loss="dpo", knob="beta", values=LAMBDAS, factor=1.0, answers=2,
           labels="bradley_terry", few=False),
    pairs("ipo", 0.1, 0.3, 1.0),
    pairs("robust", 0.3, 1.0, 3.0),
    pairs("hinge", 0.3, 1.0, 3.0),
    pairs("rpo", 0.3, 1.0, 3.0),
    pairs("dpo_norm", 1.0, 3.0, 10.0),
    pairs("exo", 1.0, 3.0, 10.0),
    pairs("apo", 0.3, 1.0, 3.0, name="apo zero"),
    pairs("apo", 0.3, 1.0, 3.0, name="apo down", kind="down"),
    pairs("simpo", 0.5, 2.0, 5.0),
    pairs("orpo", 0.1, 1.0, 10.0),
    pairs("kto", 0.3, 1.0, 3.0),
    Method(name="infonca, β = 1", loss="infonca", knob="temperature", values=LAMBDAS, factor=1.0, answers=4,
           options={"beta": 1.0}),
    Method(name="infonca, β = 0.1", loss="infonca", knob="temperature", values=(5.0, 10.0, 20.0), factor=0.1,
           answers=4, options={"beta": 0.1}, few=False),
    Method(name="nca, β = 1", loss="nca", knob="temperature", values=LAMBDAS, factor=1.0, answers=4,
           options={"beta": 1.0}),
    Method(name="nca, β = 0.1", loss="nca", knob="temperature", values=(5.0, 10.0, 20.0), factor=0.1, answers=4,
           options={"beta": 0.1}, few=False),
    Method(name="alol", loss="alol", knob="clip", values=(0.2, 0.9, None)),
    Method(name="alol, all rows", loss="alol", knob="clip", values=(0.2, 0.9, None), options={"draw": "all"}),
    Method(name="alol_seq", loss="alol_seq", knob="clip", values=(0.2, 0.9, None)),
    Method(name="alol_ref_free", loss="alol_ref_free", knob="draw", values=("all", "priority")),
    Method(name="alol_kl", loss="alol_kl", knob="beta", values=(0.1,), path=True, options={"draw": "all"}),
    Method(name="wbc", loss="wbc", sigmoid=True),
    Method(name="rgold", loss="rgold", knob="floor", values=(0.0, 0.1, 0.5), sigmoid=True),
    Method(name="rlol", loss="rlol", knob="clip", values=(0.2, 0.9, None), sigmoid=True),
    Method(name="rlol, token", loss="rlol", knob="clip", values=(0.2, 0.9, None), sigmoid=True,
           options={"ratio": "token"}),
    Method(name="grpo", loss="grpo", knob="beta", values=(0.3, 1.0, 3.0), factor=1.0, answers=8),
    Method(name="grpo, no KL", loss="grpo", path=True, answers=8, options={"beta": 0.0}),
    Method(name="dr_grpo, β > 0", loss="dr_grpo", knob="beta", values=LAMBDAS, factor=1.0, answers=8,
           options={"length": 1}),
    Method(name="dr_grpo", loss="dr_grpo", path=True, answers=8),
    Method(name="dapo", loss="dapo", path=True, answers=8),
    Method(name="rloo", loss="rloo", knob="beta", values=LAMBDAS, factor=1.0, answers=8),
    Method(name="ppo", loss="ppo", knob="beta", values=LAMBDAS, factor=1.0, options={"value_weight": 1.0}),
    Method(name="var_online", loss="var_online", path=True, answers=8),
)  # fmt: skip


def rows_of(
    world: World, method: Method, value: Any, prompts: Tensor, answers: Tensor, generator: torch.Generator
) -> Rows:
    """make_rows as `method` wants it."""
    return make_rows(
        world, method.build(value), prompts, answers, generator, rewards=method.rewards(world),
        weights=method.weights(world, value), best=method.best, labels=method.labels,
    )  # fmt: skip


def train(
    policy: TabularPolicy,
    world: World,
    loss: Any,
    rows: Iterator[Rows],
    *,
    steps: int,
    rate: float,
    decay: bool = True,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Adam; the learning rate falls to 0, so that what is left is the objective's own fixed point, or stays.

    watch(step, loss) is called before each step, and after the last one with its number.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps if decay else 1)
        value = loss_on(world, loss, next(rows), policy)
        if watch is not None:
            watch(step, value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    if watch is not None:
        watch(steps, math.nan)


def new_policy(kind: type[TabularPolicy], world: World, loss: Any) -> TabularPolicy:
    """Table or Shared, with a critic where the loss wants one."""
    return kind(world, Need.VALUES in loss.needs)
