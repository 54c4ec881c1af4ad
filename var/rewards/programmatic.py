"""Rewards computed by small programs, without a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from var.rewards.base import Answers, Prompts
from var.rewards.numbers import READER_VERSION, find_last_number, read_number
from var.utils.errors import UserError
from var.utils.extras import import_extra


class NumberReward:
    """Base of rewards that compare the number that a response ends with (see `var.rewards.numbers`) with the answer."""

    program: str
    scores_text = True
    reads_answers = True

    def _grade(self, found: Fraction | None, answer: Fraction) -> float:
        """Return the reward of a response from its number, None if it has none."""
        raise NotImplementedError

    def answer_fault(self, answer: str) -> str | None:
        """Return a reason if the answer is not one finite number, else None."""
        return None if read_number(answer) else f"its answer {answer[:60]!r} is not a finite number"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The name of the program and the version of its reader."""
        return {"program": self.program, "version": READER_VERSION}

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one reward per response."""
        rewards = []
        for text, answer in zip(responses, require_answers(answers), strict=True):
            if (right := read_number(answer)) is None:
                raise UserError(f"this reward compares with a number, but a row's `answer` is {answer[:60]!r}")
            found = find_last_number(text)
            rewards.append(self._grade(None if found is None else found.value, right.value))
        return rewards


@dataclass(frozen=True, kw_only=True)
class ExactNumber(NumberReward):
    """Score a response with 1 if its last number equals the row's answer, else with 0."""

    program = "exact_number"
    counts = "right answers"

    def _grade(self, found: Fraction | None, answer: Fraction) -> float:
        return float(found == answer)


@dataclass(frozen=True, kw_only=True)
class NearNumber(NumberReward):
    """Score a response with max(0, 1 − |n − a|/(1 + |a|)) for its last number n and the row's answer a.

    A response without a number scores 0. The reward is graded, so that wrong answers differ.
    """

    program = "near_number"

    def _grade(self, found: Fraction | None, answer: Fraction) -> float:
        return 0.0 if found is None else max(0.0, 1 - abs(float(found) - float(answer)) / (1 + abs(float(answer))))


def require_answers(answers: Answers) -> list[str]:
    """Return the answers. Raise a `UserError` if one is missing."""
    if any(answer is None for answer in answers):
        raise UserError("this reward compares with a row's `answer`, but these rows have none")
    return list(answers)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Sentiment:
    """Score a response with VADER's compound sentiment in [−1, 1] (Hutto and Gilbert, 2014; extra `sentiment`)."""

    scores_text = True

    @cached_property
    def _analyzer(self) -> Any:
        vader = import_extra("vaderSentiment.vaderSentiment", "sentiment", "reward=sentiment")
        return vader.SentimentIntensityAnalyzer()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The name and version of the program. Raise a `UserError` if the package is missing."""
        self._analyzer  # noqa: B018
        return {"program": "vader", "version": 1}

    def __call__(self, prompts: Prompts, responses: Sequence[str], answers: Answers) -> list[float]:
        """Return one sentiment per response."""
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in responses]
