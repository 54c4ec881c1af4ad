"""The score that the data carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var.data.rows import Message
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward is the data's own score of each response. It cannot score new text.

    mismatch_gap: what a response's score loses under a prompt that it does not answer, in reward units, for the
    in-batch estimators (with gaps of 2 to 5 standard deviations their weights tend to SFT's). None: they are refused
    with this reward.
    """

    mismatch_gap: float | None = None

    scores_text = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"score": "data"}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        raise UserError(
            "reward=score reads the scores that the data carries and cannot score other text; choose a reward that can"
        )
