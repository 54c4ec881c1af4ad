"""Rewards that are programs: exact, free, and without a model."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from var.data.rows import Message
from var.utils.errors import UserError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class ExactNumber:
    """1 where the last number of the response equals the row's answer, else 0."""

    scores_text = True
    reads_answers = True

    def answer_fault(self, answer: str) -> str | None:
        return _fault(answer)

    @property
    def identity(self) -> dict[str, Any]:
        return {"program": "exact_number", "version": 1}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        return [float(found == wanted) for found, wanted in _numbers(responses, answers)]


@dataclass(frozen=True, kw_only=True)
class NearNumber:
    """How near the last number n of the response is to the row's answer a: 1 − |n − a|/(1 + |a|), at least 0.

    0 where there is no number. Graded, so that of two wrong answers one is better.
    """

    scores_text = True
    reads_answers = True

    def answer_fault(self, answer: str) -> str | None:
        return _fault(answer)

    @property
    def identity(self) -> dict[str, Any]:
        return {"program": "near_number", "version": 1}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        return [
            0.0 if found is None else max(0.0, 1 - abs(found - wanted) / (1 + abs(wanted)))
            for found, wanted in _numbers(responses, answers)
        ]


def _numbers(responses: Sequence[str], answers: Sequence[str | None]) -> list[tuple[float | None, float]]:
    """The last number of each response, and the one that its row wants."""
    found = [None if (number := last_number(text)) is None else float(number) for text in responses]
    return list(zip(found, map(_number, given(answers)), strict=True))


def _number(answer: str) -> float:
    if _fault(answer):
        raise UserError(f"this reward compares with a number, and a row's `answer` is {answer!r}")
    return float(answer.replace(",", ""))


def _fault(answer: str) -> str | None:
    """What is wrong with an answer that is to be a number."""
    try:
        if math.isfinite(float(answer.replace(",", ""))):
            return None
    except ValueError:
        pass
    return f"its answer {answer[:60]!r} is no finite number"


def given(answers: Sequence[str | None]) -> list[str]:
    """UserError where a row has none."""
    if any(answer is None for answer in answers):
        raise UserError("this reward compares with a row's `answer`; these rows have none")
    return list(answers)  # type: ignore[arg-type]


def last_number(text: str) -> str | None:
    """Without its commas; None where there is no number."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


@dataclass(frozen=True, kw_only=True)
class Sentiment:
    """VADER's compound sentiment of the response, in [−1, 1] (Hutto and Gilbert, 2014; package vaderSentiment)."""

    scores_text = True

    @cached_property
    def _analyzer(self) -> Any:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise UserError("reward=sentiment needs an extra: pip install -e '.[sentiment]'") from error
        return SentimentIntensityAnalyzer()

    @property
    def identity(self) -> dict[str, Any]:
        self._analyzer  # noqa: B018  a missing package is told before anything is sampled
        return {"program": "vader", "version": 1}

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in responses]
