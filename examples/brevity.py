"""A custom reward: the closer a response is to a target number of words, the higher its reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var.data.messages import Message
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Brevity:
    """−|n − words| / words for a response of n words: at most 0, in units of the target length."""

    words: int = 12
    """The target number of words, at least 1."""

    scores_text = True  # the reward can score any text, including the policy's own responses

    def __post_init__(self) -> None:
        if self.words < 1:
            raise UserError(f"reward.words: expected an integer of at least 1, got {self.words}.")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Return what the numbers depend on, for the cache key. Increase `version` when the code below changes."""
        return {"program": "brevity", "version": 1, "words": self.words}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        """Return one reward per response. Prompts and reference answers are not used."""
        return [-abs(len(text.split()) - self.words) / self.words for text in responses]
