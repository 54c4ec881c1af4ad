"""A reward of one's own: the nearer an answer is to so many words, the better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var.data.rows import Message
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Brevity:
    """−|n − words|/words of an answer of n words: 0 at best, in units of the wanted length."""

    words: int = 12

    scores_text = True  # it reads any text, the policy's own answers too

    def __post_init__(self) -> None:
        if self.words < 1:
            raise UserError(f"reward.words is at least 1, got {self.words}")

    @property
    def identity(self) -> dict[str, Any]:
        """What its numbers depend on: the store's key. Raise `version` when the code below changes."""
        return {"program": "brevity", "version": 1, "words": self.words}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        return [-abs(len(text.split()) - self.words) / self.words for text in responses]
