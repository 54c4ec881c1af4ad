"""Rewards for tests whose scores differ from response to response."""

from dataclasses import dataclass
from typing import Any

OWN_REWARD = '''
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Distinct:
    """The number of distinct characters: a custom reward, outside the project."""

    scores_text = True
    fingerprint = {"program": "distinct"}

    def __call__(self, prompts, responses, answers):
        return [float(len(set(text))) for text in responses]
'''


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """The fraction of distinct characters, in [0, 1]. Use it with `reward._target_=tests.helpers.rewards.Distinct`."""

    scores_text = True
    fingerprint = {"program": "distinct"}  # noqa: RUF012

    def __call__(self, prompts: Any, responses: list[str], answers: Any) -> list[float]:
        """Return one score per response."""
        return [len(set(text)) / max(8, len(text)) for text in responses]
