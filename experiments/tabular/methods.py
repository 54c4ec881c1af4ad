"""The objectives of the package as the studies train them: each by its file in `conf/loss`, over its own setting."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from var.requirements import Advantages, Desirable, Groups, Pairs, Rollout, SequenceScores, find
from var.testbed.methods import list_losses, load_loss
from var.testbed.rows import Labels, Rows, make_rows
from var.testbed.world import World

DATA_SETTINGS = ("K", "λ")
"""Knobs that are not settings of the loss."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One objective and the values of the setting that is varied, its knob."""

    name: str
    """As the tables show it."""
    loss: str
    """The name of its file in `conf/loss`."""
    knob: str | None = None
    """The setting that is varied."""
    values: tuple[Any, ...] = (None,)
    """The values of the knob."""
    factor: float | None = None
    """λ of RLHF is this factor times the knob. None: the objective has no λ."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the loss that differ from its file, by dotted key."""
    answers: int = 1
    """K, the responses per prompt."""
    best: bool = False
    """Train on the best of the K responses only."""
    labels: Labels = "reward"
    """How the better response of a pair is chosen."""
    sigmoid: bool = False
    """Pass rewards through a sigmoid, because the loss does not accept negative ones."""
    path: bool = False
    """The objective has no fixed point, so it is recorded along training."""
    few: bool = True
    """Also train it on few rows."""

    @property
    def online(self) -> bool:
        """Whether it trains on responses of the policy itself."""
        return find(self.build(self.values[0]).requires, Rollout) is not None

    @property
    def family(self) -> str:
        """The name of its family, by what the loss needs."""
        if self.online:
            return "online"
        requires = self.build(self.values[0]).requires
        if any(find(requires, kind) for kind in (Pairs, Groups, Desirable)):
            return "preferences"
        return "A-LoL and its baselines" if self.sigmoid or find(requires, Advantages) else "SFT and VAR"

    def build(self, value: Any = None) -> Any:
        """Return the loss at a value of the knob."""
        varied = {} if self.knob is None or self.knob in DATA_SETTINGS else {self.knob: value}
        return load_loss(self.loss, **{**self.options, **varied})

    def answers_at(self, value: Any) -> int:
        """Return K at a value of the knob. K is the knob of rejection sampling."""
        return int(value) if self.knob == "K" else self.answers

    def temperature(self, value: Any) -> float | None:
        """Return λ of RLHF at a value of the knob."""
        return None if self.factor is None else self.factor * value

    def row_options(self, world: World, value: Any) -> dict[str, Any]:
        """Return the arguments of `make_rows`. If λ is the knob, the data has the weights e^{r/λ} / Z(x), exactly."""
        return {
            "rewards": world.rewards.sigmoid() if self.sigmoid else world.rewards,
            "weights": (world.optimum(value) - world.logps).exp() if self.knob == "λ" else None,
            "best": self.best,
            "labels": self.labels,
        }

    def rows(self, world: World, value: Any, prompts: Tensor, answers: Tensor, generator: torch.Generator) -> Rows:
        """Return the rows on which the method trains, of prompts [Q] with responses [Q, K]."""
        return make_rows(world, self.build(value), prompts, answers, generator, **self.row_options(world, value))


LAMBDAS = (0.5, 1.0, 2.0)


def var_method(name: str, loss: str, answers: int, **options: Any) -> Method:
    """Return a form of VAR, over λ in units of the reward."""
    return Method(name=name, loss=loss, knob="temperature", values=LAMBDAS, factor=1.0, answers=answers,
                  options={"temperature_unit": "reward", **options})  # fmt: skip


def preference_method(loss: str, *values: float, **options: Any) -> Method:
    """Return a loss on pairs, over β."""
    return Method(name=options.pop("name", loss), loss=loss, knob="beta", values=values, answers=2, options=options)


LISTED: tuple[Method, ...] = (
    Method(name="sft", loss="sft"),
    Method(name="rejection sampling", loss="sft", knob="K", values=(2, 4, 16), best=True),
    Method(name="weighted, exact Z", loss="weighted", knob="λ", values=LAMBDAS, factor=1.0),
    var_method("var", "var", 1),
    var_method("var_sum", "var_sum", 1),
    var_method("var_own", "var_own", 1),
    var_method("var_literal", "var_literal", 1),
    var_method("var_prompt", "var_prompt", 4),
    var_method("var_grouped", "var_grouped", 4),
    var_method("var_value", "var_value", 4),
    var_method("var_value, no cap", "var_value", 4, **{"estimator.cap": 1e9}),
    var_method("var_global", "var_global", 1),
    var_method("var_sampled", "var_sampled", 1),
    var_method("var_sampled, no cap", "var_sampled", 1, **{"estimator.cap": None}),
    preference_method("dpo", 0.3, 1.0, 3.0),
    Method(name="dpo, Bradley-Terry labels", loss="dpo", knob="beta", values=LAMBDAS, factor=1.0, answers=2,
           labels="bradley_terry", few=False),
    preference_method("ipo", 0.1, 0.3, 1.0),
    preference_method("robust", 0.3, 1.0, 3.0),
    preference_method("hinge", 0.3, 1.0, 3.0),
    preference_method("rpo", 0.3, 1.0, 3.0),
    preference_method("dpo_norm", 1.0, 3.0, 10.0),
    preference_method("exo", 1.0, 3.0, 10.0),
    preference_method("apo", 0.3, 1.0, 3.0, name="apo zero"),
    preference_method("apo", 0.3, 1.0, 3.0, name="apo down", kind="down"),
    preference_method("simpo", 0.5, 2.0, 5.0),
    preference_method("orpo", 0.1, 1.0, 10.0),
    preference_method("kto", 0.3, 1.0, 3.0),
    Method(name="infonca, β = 1", loss="infonca", knob="temperature", values=LAMBDAS, factor=1.0, answers=4,
           options={"beta": 1.0}),
    Method(name="infonca, β = 0.1", loss="infonca", knob="temperature", values=(5.0, 10.0, 20.0), factor=0.1,
           answers=4, options={"beta": 0.1}, few=False),
    Method(name="nca, β = 1", loss="nca", knob="temperature", values=LAMBDAS, factor=1.0, answers=4,
           options={"beta": 1.0}),
    Method(name="nca, β = 0.1", loss="nca", knob="temperature", values=(5.0, 10.0, 20.0), factor=0.1, answers=4,
           options={"beta": 0.1}, few=False),
    Method(name="trajectory balance, α = 1", loss="trajectory_balance", knob="temperature", values=LAMBDAS, factor=1.0,
           answers=4),
    Method(name="trajectory balance, α = 0", loss="trajectory_balance", knob="temperature", values=LAMBDAS, factor=1.0,
           answers=4, options={"alpha": 0.0}),
    Method(name="dro", loss="dro", knob="temperature", values=LAMBDAS, factor=1.0),
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


def list_others() -> list[Method]:
    """Return the losses of `conf/loss` that are not listed above, at their own settings and with K = 4.

    Reward models are omitted.
    """
    losses = {name: load_loss(name) for name in list_losses() if name not in {method.loss for method in LISTED}}
    policies = [name for name, loss in losses.items() if not find(loss.requires, SequenceScores)]
    return [Method(name=name, loss=name, answers=4) for name in policies]


METHODS: tuple[Method, ...] = (*LISTED, *list_others())
"""Every objective of the package. A new loss is here as soon as `conf/loss` has it."""
