"""A reward with errors, to see what wrong labels do to a method."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from var.data.messages import last_text
from var.rewards.base import Answers, Prompts
from var.rewards.programmatic import ExactNumber

DRAWS = 2**32


@dataclass(frozen=True, kw_only=True)
class FlippedNumber(ExactNumber):
    """Score as `ExactNumber` does, and replace a fraction of the scores r by 1 − r.

    A hash of the prompt and the text decides which, as a reward model is wrong about the same text each time.
    """

    rate: float
    """The fraction, in [0, 1]."""
    counts = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rewards depend on."""
        return {**super().fingerprint, "flipped": self.rate}

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one reward per response."""
        right = super().__call__(prompts, responses, answers)
        flips = [self._flips(last_text(prompt), text) for prompt, text in zip(prompts, responses, strict=True)]
        return [1 - score if flip else score for score, flip in zip(right, flips, strict=True)]

    def _flips(self, prompt: str, response: str) -> bool:
        digest = hashlib.sha256(f"{prompt}\0{response}".encode()).digest()
        return int.from_bytes(digest[:4], "little") < self.rate * DRAWS
