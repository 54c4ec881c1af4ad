"""Several rewards as one: their mean, or the least of them (Coste et al., arXiv 2310.02743)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from var.data.rows import Message
from var.rewards.base import Reward, scored
from var.rewards.scale import Scale
from var.utils.errors import UserError

ADD = "+reward@reward.members.a=classifier reward.members.a.path=… (a is a name of yours)"


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Each member's raw reward on `scale`, then the mean, or the least: what no member objects to.

    weights: of the mean, by member, divided by their sum; null: all alike.
    min of raw rewards is a trap where the members' units differ: a member of −10 to −5 is always the least beside one
    of 0 to 1, and the other then counts for nothing. scale=sigmoid puts all into [0, 1], which is a common unit only
    for members that are logits of a preference. A z-score is none of the two scales: its moments are of a run's data.
    """

    members: Mapping[str, Reward]
    how: Literal["mean", "min"] = "mean"
    scale: Literal["raw", "sigmoid"] = "raw"
    weights: Mapping[str, float] | None = None

    scores_text = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", dict(self.members))
        object.__setattr__(self, "weights", None if self.weights is None else dict(self.weights))
        if not self.members:
            raise UserError(f"reward=ensemble has no members; add some: {ADD}")
        if self.how not in ("mean", "min") or self.scale not in ("raw", "sigmoid"):
            raise UserError(f"reward.how is mean or min and reward.scale raw or sigmoid, got {self.how}, {self.scale}")
        for name, member in self.members.items():
            if not hasattr(member, "scores_text"):
                raise UserError(f"reward.members.{name} is no reward but {member!r}; a member is added so: {ADD}")
            if not member.scores_text:
                raise UserError(
                    f"reward.members.{name} ({type(member).__name__}) reads scores of the data and cannot score text, "
                    "so an ensemble cannot ask it; choose a reward that can"
                )
        if self.weights is None:
            return
        if self.how == "min":
            raise UserError("reward.weights are of the mean; beside reward.how=min they do nothing: set them to null")
        if set(self.weights) != set(self.members) or not all(weight > 0 for weight in self.weights.values()):
            raise UserError(
                f"reward.weights is a number above 0 for each of {', '.join(self.members)}, got {self.weights}"
            )

    @property
    def reads_answers(self) -> bool:
        return any(getattr(member, "reads_answers", False) for member in self.members.values())

    def answer_fault(self, answer: str) -> str | None:
        """Of the first member that cannot compare with it."""
        find_faults = [getattr(member, "answer_fault", lambda answer: None)(answer) for member in self.members.values()]
        return next(filter(None, find_faults), None)

    @property
    def identity(self) -> dict[str, Any]:
        members = {name: member.identity for name, member in self.members.items()}
        return {"ensemble": members, "how": self.how, "scale": self.scale, "weights": self.weights}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        scale = Scale(kind=self.scale)
        scores = np.stack([scale(scored(member, prompts, responses, answers)) for member in self.members.values()])
        if self.how == "min":
            return scores.min(axis=0).tolist()
        weights = None if self.weights is None else [self.weights[name] for name in self.members]
        return np.average(scores, axis=0, weights=weights).tolist()
