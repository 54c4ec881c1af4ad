"""Ensembles of rewards: their mean or their minimum (Coste et al., arXiv 2310.02743)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from var.data.messages import Message
from var.rewards.base import Answers, Prompts, Reward, compute_scores, release
from var.rewards.scale import Scale
from var.utils.errors import UserError

ADD = "+reward@{key}.members.NAME=classifier {key}.members.NAME.path=…"


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Combine the scaled rewards of all members.

    With how=min and scale=raw, members should have the same unit: a member between −10 and −5 is always below a member
    between 0 and 1, which then has no effect. scale=sigmoid maps all rewards to [0, 1], which is a common unit only if
    the members are logits of a preference. A z-score is not available here: its moments depend on the data of a run.
    """

    members: Mapping[str, Reward]  # by a name of the user's choice
    how: Literal["mean", "min"] = "mean"
    scale: Literal["raw", "sigmoid"] = "raw"  # applied to each member's raw reward
    weights: Mapping[str, float] | None = None  # of the mean, by member, divided by their sum; None: equal weights
    key: str = field(default="reward", compare=False)  # where these settings are, for messages

    scores_text = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", dict(self.members))
        object.__setattr__(self, "weights", None if self.weights is None else dict(self.weights))
        if not self.members:
            raise UserError(f"{self.key}.members: an ensemble needs members. Add some: {ADD.format(key=self.key)}")
        if self.how not in ("mean", "min") or self.scale not in ("raw", "sigmoid"):
            raise UserError(
                f"{self.key}: expected how=mean or min and scale=raw or sigmoid, got how={self.how} scale={self.scale}"
            )
        for name, member in self.members.items():
            if not hasattr(member, "scores_text"):
                raise UserError(
                    f"{self.key}.members.{name}: not a reward, got {type(member).__name__}. Add members: "
                    f"{ADD.format(key=self.key)}"
                )
            if not member.scores_text:
                raise UserError(
                    f"{self.key}.members.{name}: {type(member).__name__} reads the data set's own scores and "
                    "cannot score text. Choose a reward that can"
                )
        if self.weights is None:
            return
        if self.how == "min":
            raise UserError(f"{self.key}.weights: has no effect with {self.key}.how=min. Set it to null")
        if set(self.weights) != set(self.members) or not all(weight > 0 for weight in self.weights.values()):
            got = ", ".join(f"{name}: {weight}" for name, weight in self.weights.items())
            raise UserError(f"{self.key}.weights: expected positive numbers for {', '.join(self.members)}, got {got}")

    def release(self) -> None:
        """Free the memory of all members."""
        for member in self.members.values():
            release(member)

    @property
    def origin(self) -> dict[str, Any]:
        """The weights that the members use."""
        return {name: getattr(member, "origin", None) for name, member in self.members.items()}

    @property
    def reads_answers(self) -> bool:
        """Whether any member compares with answers."""
        return any(getattr(member, "reads_answers", False) for member in self.members.values())

    def answer_fault(self, answer: str) -> str | None:
        """Return the reason of the first member that cannot use the answer, or None."""
        faults = (getattr(member, "answer_fault", lambda answer: None)(answer) for member in self.members.values())
        return next(filter(None, faults), None)

    def text_fault(self, prompt: Sequence[Message], response: str) -> str | None:
        """Return the reason of the first member that cannot score a text, or None."""
        faults = (getattr(member, "text_fault", lambda *_: None)(prompt, response) for member in self.members.values())
        return next(filter(None, faults), None)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The members' fingerprints and the settings."""
        members = {name: member.fingerprint for name, member in self.members.items()}
        return {"ensemble": members, "how": self.how, "scale": self.scale, "weights": self.weights}

    def measure_memory(self) -> float | None:
        """Return the bytes of all members on a device, or None if one's sizes are not known here."""
        sizes = [getattr(member, "measure_memory", lambda: 0.0)() for member in self.members.values()]
        return None if None in sizes else float(sum(sizes))

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one combined reward per response."""
        scale = Scale(kind=self.scale)
        scores = np.stack([scale(compute_scores(m, prompts, responses, answers)) for m in self.members.values()])
        if self.how == "min":
            return scores.min(axis=0).tolist()
        weights = None if self.weights is None else [self.weights[name] for name in self.members]
        return np.average(scores, axis=0, weights=weights).tolist()
