"""AlpacaEval 2.0: graded preferences from log-probabilities, and their win rate at equal length; the prompt is ours.

Dubois et al., arXiv 2404.04475, and the package alpaca_eval 0.6.6 (annotator weighted_alpaca_eval_gpt4_turbo), with
which the numbers are compared in the tests. Two things differ: the order of the answers is drawn by the pair's content,
and each seed is fitted separately and the rates are averaged.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from var.data.messages import last_text
from var.evaluate.judges.base import Judgement, Outcome, Pair, decide_outcome
from var.evaluate.judges.endpoint import EndpointJudge, Game, UnreadableReply
from var.evaluate.judges.length_control import (
    FEATURES,
    Gamed,
    fit_length_control,
    import_estimator,
    read_difficulty,
    read_gamed,
    read_reference,
)
from var.utils.errors import Problems, UserError
from var.utils.reasoning import UnfinishedReasoning, find_answer
from var.utils.statistics import Estimate, estimate_mean

TOLERANCE = 10  # percent
MATCHED = f"win rate among pairs of lengths within ±{TOLERANCE} %"


@dataclass(frozen=True, kw_only=True)
class AlpacaEval(EndpointJudge):
    """One game per pair; the score is the answer's part of the probability of the first token, "m" against "M".

    If the judge thinks aloud, the first token after its reasoning counts, and `request` needs a larger max_tokens.

    As in the package, tokens with a space before the letter do not count. The win rate is the mean score. If `gamed` is
    given, there is a length-controlled win rate too.
    """

    protocol = "alpaca_eval_2"
    example = "M"
    settings = ("length_control",)
    orders = "random"

    request: Mapping[str, Any] = field(
        default_factory=lambda: {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    )

    reference: str | None = None
    """alpaca_eval.json, whose order numbers the instructions; None: the rows' ids are these numbers."""
    difficulty: str | None = None
    """instruction_difficulty.csv; None: the difficulties in `gamed`."""
    gamed: str | None = None
    """df_gamed.csv, which length control needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamed is None and (self.reference or self.difficulty):
            raise UserError(
                "judge.reference and judge.difficulty serve the length-controlled win rate. Set judge.gamed to the "
                "path of df_gamed.csv too."
            )

    @cached_property
    def _gamed(self) -> Gamed:
        return read_gamed(str(self.gamed))

    @cached_property
    def _difficulty(self) -> dict[int, float]:
        return self._gamed.by_index if self.difficulty is None else read_difficulty(self.difficulty)

    @cached_property
    def _reference(self) -> dict[str, list[int]] | None:
        return None if self.reference is None else read_reference(self.reference)

    @property
    def length_control(self) -> bool:
        """Whether there is a length-controlled win rate."""
        return self.gamed is not None

    def check(self) -> None:
        """Read the template and the files of length control, and check the client."""
        if self.gamed is not None:
            import_estimator()
            self._gamed, self._difficulty, self._reference  # noqa: B018
        super().check()

    def describe(self, pairs: Sequence[Pair]) -> str:
        """Return the number of calls and their cost. Raise UserError for pairs that are not in the files."""
        self._difficulties(pairs)
        return super().describe(pairs)

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement:
        """Judge the pairs. Raise UserError for pairs that are not in the files, before a request is sent."""
        self._difficulties(pairs)
        return super().__call__(pairs, advance)

    def _read(self, reply: Mapping[str, Any]) -> float:
        return read_preference(reply)

    def _decide(self, games: Sequence[Game]) -> tuple[Outcome, float, list[float]]:
        (game,) = games
        preference = math.nan if game["verdict"] is None else float(game["verdict"])
        score = preference if game["order"] == "answer first" else 1 - preference
        return decide_outcome(score), score, [score]

    def _summarize(self, pairs: Sequence[Pair], judgement: Judgement) -> dict[str, Any]:
        valid, difficulties = judgement.facts["reason"] is None, self._difficulties(pairs)
        rates = compute_win_rate(pairs, judgement.scores, valid)
        if difficulties is None:
            return rates
        controlled = self._control(pairs, judgement.scores, difficulties) if valid else {"lc_win_rate": None}
        return {**rates, **controlled}

    def _difficulties(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        """Return each pair's difficulty [n]; None without length control."""
        if self.gamed is None:
            return None
        problems = Problems("pairs that AlpacaEval's files do not hold")
        difficulties: dict[str, float] = {}
        seen: Counter[str] = Counter()
        for pair in pairs:
            if pair.id in difficulties:
                continue
            text, place = last_text(pair.prompt).strip(), None
            if self._reference is None:
                place = int(pair.id) if pair.id.isdecimal() else None
            elif places := self._reference.get(text):
                place = places[min(seen[text], len(places) - 1)]  # an instruction may occur twice, with two numbers
                seen[text] += 1
            if place is None:
                by_id = self._reference is None
                problems.add(pair.id, "is not a number" if by_id else "its instruction is not in judge.reference")
            elif place not in self._difficulty:
                problems.add(pair.id, f"instruction {place} has no difficulty")
            difficulties[pair.id] = math.nan if place is None else self._difficulty.get(place, math.nan)
        problems.check(
            "The length-controlled win rate is defined for AlpacaEval's own instructions. For others use "
            "judge.gamed=null. If the ids are not the instructions' numbers, set judge.reference to alpaca_eval.json."
        )
        return np.array([difficulties[pair.id] for pair in pairs])

    def _control(self, pairs: Sequence[Pair], scores: np.ndarray, difficulties: np.ndarray) -> dict[str, Any]:
        """Fit each seed separately and average the rates."""
        seeds = np.array([pair.seed for pair in pairs])
        longer = count_longer(pairs)
        order, fits = [], []
        for seed in dict.fromkeys(seeds.tolist()):
            index = np.flatnonzero(seeds == seed)
            if np.ptp(longer[index]) == 0 or np.isnan(scores[index]).all():
                reason = "a seed has no judged pair, or all its pairs have the same length difference"
                return {"lc_win_rate": None, "lc_reason": reason}
            fits.append(fit_length_control(scores[index], longer[index], difficulties[index], self._gamed))
            order += index.tolist()
        predicted = np.concatenate([fit.predicted for fit in fits])
        return {
            "lc_win_rate": 100 * float(np.mean([fit.predicted.mean() for fit in fits])),
            "lc_se": estimate_mean(predicted, [pairs[i].id for i in order]).scale(100).se,
            "lc_weights": [dict(zip(FEATURES, fit.weights.tolist(), strict=True)) for fit in fits],
            "lc_strength": [fit.strength for fit in fits],
            "gamed_rows": len(self._gamed.preference),
            "gamed_rows_without_preference": self._gamed.skipped,
        }


def read_preference(reply: Mapping[str, Any]) -> float:
    """Return p(m) / (p(m) + p(M)) of the first token after the judge's reasoning, in [0, 1]."""
    try:
        tokens = reply["choices"][0]["logprobs"]["content"]
        top = tokens[find_answer(reply, [entry.get("token", "") for entry in tokens])]["top_logprobs"]
        logps = {entry["token"]: float(entry["logprob"]) for entry in top}
    except UnfinishedReasoning:
        raise
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UnreadableReply("no log-probabilities") from None
    m, other = logps.get("m", -math.inf), logps.get("M", -math.inf)
    peak = max(m, other)
    if not peak > -math.inf:
        raise UnreadableReply("neither m nor M")
    mass = math.exp(m - peak), math.exp(other - peak)
    return mass[0] / sum(mass)


def count_longer(pairs: Sequence[Pair]) -> np.ndarray:
    """Return the number of characters [n] that the opponent has more than the answer."""
    return np.array([len(pair.opponent) - len(pair.answer) for pair in pairs], dtype=float)


def compute_win_rate(pairs: Sequence[Pair], scores: np.ndarray, valid: bool) -> dict[str, Any]:
    """Return the mean score in percent, clustered by prompt, and the same among pairs of nearly equal length.

    The second is not a length-controlled win rate: pairs of equal length are not a random sample of all pairs. Without
    `valid` (too many errors) both are None.
    """
    lengths = np.array([len(pair.opponent) for pair in pairs])
    near = ~np.isnan(scores) & (100 * np.abs(count_longer(pairs)) <= TOLERANCE * lengths)
    ids = np.array([pair.id for pair in pairs])
    total, matched = (
        estimate_mean(values, ids).scale(100) if valid else Estimate(math.nan)
        for values in (scores, np.where(near, scores, math.nan))
    )
    rate = {"win_rate": matched.to_json()["mean"], "n": int(near.sum())}
    return {"win_rate": total.to_json()["mean"], "win_rate_se": total.se, MATCHED: rate}
