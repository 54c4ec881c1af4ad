"""The score in the data set as reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var.rewards.base import Answers, Prompts
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Score:
    """Use the data set's own score of each response. This reward cannot score new text."""

    # What a response's score loses under a prompt that it does not answer, in reward units. In-batch estimators need
    # it; with gaps of 2 to 5 standard deviations their weights approach those of SFT. None: they are rejected.
    mismatch_gap: float | None = None

    scores_text = False

    @property
    def fingerprint(self) -> dict[str, Any]:
        """A constant: the scores are part of the data set."""
        return {"score": "data"}

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Raise a `UserError`."""
        raise UserError(
            "reward=score reads the data set's own scores and cannot score other text. Choose a reward that can"
        )
