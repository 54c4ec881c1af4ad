"""Judges decide which of two answers is better: pairs, judgements, win rates, and a reward as judge."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from var.data.messages import Message
from var.rewards.base import Reward, compute_scores
from var.utils.console import say, stage, warn
from var.utils.errors import Problems, UserError
from var.utils.statistics import Estimate, estimate_mean

Outcome = Literal["win", "tie", "loss", "error"]

UNFINISHED = "unfinished reasoning"
"""The error of a game whose reply ends inside the judge's reasoning."""
ADVICE = (
    "The judge's replies end inside its reasoning. Raise judge.request.max_tokens, or turn the reasoning off, for "
    "example with +judge.request.chat_template_kwargs.enable_thinking=false"
)


@dataclass(frozen=True)
class Pair:
    """An answer and its opponent for one prompt."""

    id: str
    """The row's id."""
    subset: str | None
    """The row's subset."""
    seed: int
    """The sampling seed of the answer."""
    prompt: tuple[Message, ...]
    """The messages that both texts answer."""
    answer: str
    """The answer that is evaluated."""
    opponent: str
    """The answer that it is compared with."""
    gold: str | None = None
    """The row's `answer`, which some rewards compare with."""


@dataclass(frozen=True)
class Judgement:
    """A judge's decisions on n pairs."""

    outcomes: list[Outcome]
    """[n] outcomes of `answer` against `opponent`."""
    scores: np.ndarray
    """[n] 1, 0.5, 0 or a graded preference in [0, 1]; NaN for an error."""
    games: list[dict[str, Any]]
    """One JSON record per game, from which every table can be computed again."""
    facts: dict[str, Any]
    """Protocol, template, model, errors by kind, usage, and the protocol's own numbers, as JSON values."""
    counts: list[list[float]] | None = None
    """Per pair, the values in [0, 1] whose mean is the protocol's win rate; None: 1 for a win and 0 otherwise."""


class Judge(Protocol):
    """A judge of pairs."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that a judgement depends on, as JSON."""

    def check(self) -> None:
        """Raise a UserError for settings, files or packages that would fail later."""

    def describe(self, pairs: Sequence[Pair]) -> str:
        """Return what judging the pairs will cost."""

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement:
        """Judge the pairs; advance is called with the number of pairs that are done."""


def decide_outcome(score: float) -> Outcome:
    """Return the outcome of a preference in [0, 1] for the answer; NaN is an error."""
    if math.isnan(score):
        return "error"
    return "win" if score > 0.5 else "loss" if score < 0.5 else "tie"


def compute_rates(judgement: Judgement, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return the win rates per subset, over all pairs, and their mean over subsets as in the paper.

    win_rate: the protocol's, in percent: the mean of `counts`, or the fraction of wins. Errors are excluded and
    counted. mean_score: in [0, 1]; a tie counts half. se_prompts: standard error of win_rate, clustered by prompt.
    se_seeds: standard deviation of the seeds' win rates over √seeds. If the fraction of errors is above
    facts["max_errors"], there is no win rate, and `reason` says so. Undefined values are None.
    """
    members: dict[str, list[int]] = defaultdict(list)
    if any(pair.subset is not None for pair in pairs):
        for i, pair in enumerate(pairs):
            members["without subset" if pair.subset is None else pair.subset].append(i)
    subsets = {name: _rate(judgement, pairs, index) for name, index in sorted(members.items())}
    total = _rate(judgement, pairs, range(len(pairs)))
    parts = list(subsets.values()) or [total]
    seeds = [_average(rates) for rates in zip(*(part["by_seed"] for part in parts), strict=True)]
    for part in (*subsets.values(), total):
        del part["by_seed"]
    return {
        "subsets": subsets,
        "all": total,
        "average": _average([part["win_rate"] for part in parts]),
        "average_se_seeds": _seeds_error(seeds),
    }


def _rate(judgement: Judgement, pairs: Sequence[Pair], index: Sequence[int]) -> dict[str, Any]:
    outcomes = [judgement.outcomes[i] for i in index]
    judged = [i for i in index if judgement.outcomes[i] != "error"]
    counts = judgement.counts or [[float(outcome == "win")] for outcome in judgement.outcomes]
    won = np.array([100 * count for i in judged for count in counts[i]])
    counted = [pairs[i] for i in judged for _ in counts[i]]
    reason = explain_errors(outcomes, judgement.facts["max_errors"])
    valid = reason is None and len(judged) > 0
    rate = estimate_mean(won, [pair.id for pair in counted]) if valid else Estimate(math.nan)
    by_seed = [
        _average([value for pair, value in zip(counted, won.tolist(), strict=True) if pair.seed == seed])
        if valid
        else None
        for seed in sorted({pair.seed for pair in pairs})
    ]
    return {
        "n": len(index),
        **{outcome: outcomes.count(outcome) for outcome in ("win", "tie", "loss", "error")},  # type: ignore[arg-type]
        "win_rate": rate.to_json()["mean"],
        "mean_score": float(judgement.scores[judged].mean()) if valid else None,
        "se_prompts": rate.se,
        "se_seeds": _seeds_error(by_seed),
        "reason": reason,
        "by_seed": by_seed,
    }


def _average(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if there are no values or one of them is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _seeds_error(values: Sequence[float | None]) -> float | None:
    return None if None in values or not values else estimate_mean(np.array(values, dtype=float)).se


def explain_errors(outcomes: Sequence[Outcome], max_errors: float) -> str | None:
    """Return why there is no win rate if more than the fraction max_errors of pairs is in error, else None."""
    errors = outcomes.count("error")
    if errors <= max_errors * len(outcomes):
        return None
    return (
        f"{errors} of {len(outcomes)} pairs are in error, more than max_errors={max_errors:g} allows. Failures are not "
        "random, so the other pairs give no win rate"
    )


def explain_missing_rate(rate: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """Return why `rate` ("all" of compute_rates) has no win rate, with the judgement's failures; None if it has one."""
    if rate["win_rate"] is not None:
        return None
    kinds = ", ".join(f"{number} {kind}" for kind, number in facts.get("errors", {}).items())
    failure, server = facts.get("first_failure"), facts.get("base_url")
    return (
        f"no win rate by the judge: {rate['reason'] or 'no pair was judged'}"
        + (f". Games in error: {kinds}" if kinds else "")
        + (f". First failure: {failure}" + f" ({server})" * bool(server) if failure else "")
        + (". The same command asks again for the games that failed" if "failed" in facts.get("errors", {}) else "")
        + (f". {ADVICE}" if UNFINISHED in facts.get("errors", {}) else "")
    )


@dataclass(frozen=True, kw_only=True)
class RewardJudge:
    """The answer with the higher reward wins."""

    reward: Reward
    """A reward that scores text."""
    margin: float = 0.0
    """The difference, in reward units, up to which a pair is a tie."""

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"judge.margin: expected a difference in reward of at least 0, got {self.margin}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See Judge."""
        return {"protocol": "reward", "version": 1, "reward": self.reward.fingerprint, "margin": self.margin}

    def check(self) -> None:
        """See Judge."""
        if not self.reward.scores_text:
            raise UserError(
                "judge=reward: the reward only reads the data's scores and cannot score new text. Choose another one, "
                "such as reward=offsetbias-rm-8b."
            )
        self.fingerprint  # noqa: B018

    def describe(self, pairs: Sequence[Pair]) -> str:
        """See Judge."""
        return f"{2 * len(pairs)} answers to score"

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement:
        """Score both answers of each pair, in batches of 64 pairs."""
        rewards = np.empty((len(pairs), 2))
        for start in range(0, len(pairs), 64):
            part = pairs[start : start + 64]
            for side, texts in enumerate(([pair.answer for pair in part], [pair.opponent for pair in part])):
                numbers = compute_scores(
                    self.reward, [pair.prompt for pair in part], texts, [pair.gold for pair in part]
                )
                rewards[start : start + 64, side] = numbers
            advance(len(part))
        problems = Problems("rewards that are not finite")
        for i in np.flatnonzero(~np.isfinite(rewards).all(axis=1)).tolist():
            problems.add(f"pair {pairs[i].id}, seed {pairs[i].seed}", f"{rewards[i, 0]} against {rewards[i, 1]}")
        problems.check()
        difference = rewards[:, 0] - rewards[:, 1]
        scores = np.where(difference > self.margin, 1.0, np.where(difference < -self.margin, 0.0, 0.5))
        outcomes = [decide_outcome(score) for score in scores]
        games = [
            {"id": pair.id, "subset": pair.subset, "seed": pair.seed, "rewards": both, "verdict": outcome}
            for pair, both, outcome in zip(pairs, rewards.tolist(), outcomes, strict=True)
        ]
        own = {"pairs": len(pairs), "mean_difference": float(difference.mean()) if len(pairs) else None}
        return Judgement(outcomes, scores, games, {**self.fingerprint, **own, "max_errors": 0.0, "reason": None})


def judge_pairs(judge: Judge, pairs: list[Pair]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the win rates and the judgement's facts, and one record per game; warn if the win rate is undefined."""
    say(f"Judge: {judge.describe(pairs)}")
    with stage("Judging", len(pairs), "pairs") as advance:
        judgement = judge(pairs, advance)
    rates, facts = compute_rates(judgement, pairs), judgement.facts
    overall, swapped = rates["all"], facts.get("inconsistent") or 0
    say(f"  {overall['win']} won, {overall['tie']} tied, {overall['loss']} lost, {overall['error']} without a verdict")
    if swapped > 0.5 * len(pairs):
        warn(
            f"the judge's verdict on {swapped} of {len(pairs)} pairs depends on which answer it is shown first "
            f"(the first wins {100 * (facts['first_shown_wins'] or 0):.0f}% of the games)."
        )
    if reason := explain_missing_rate(rates["all"], facts):
        warn(reason)
    elif reason := facts.get("lc_reason"):
        warn(f"no length-controlled win rate: {reason}")
    return {**rates, "facts": facts}, judgement.games
