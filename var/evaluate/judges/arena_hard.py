"""Arena-Hard 0.1 (Li et al., arXiv 2406.11939): graded verdicts in both orders, bootstrapped; the prompt is ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from var.evaluate.judges.base import Judgement, Outcome, Pair, decide_outcome
from var.evaluate.judges.endpoint import EndpointJudge, Game, UnreadableReply, find_verdict
from var.utils.errors import UserError

VERDICT = re.compile(r"\[\[([AB<>=]+)\]\]")

CLEAR = 3  # the weight of a verdict "much better"
COUNTS = {
    "A>>B": [1.0] * CLEAR, "A>B": [1.0], "A=B": [0.5], "A<B": [0.0], "A<<B": [0.0] * CLEAR,
    "B>>A": [0.0] * CLEAR, "B>A": [0.0], "B=A": [0.5], "B<A": [1.0], "B<<A": [1.0] * CLEAR,
}  # what a verdict counts for the answer that is shown first  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ArenaHard(EndpointJudge):
    """Two games per pair; a clear verdict (>>) counts three times. The win rate is the mean over all counts.

    A pair's score is the mean of its own counts.
    """

    protocol = "arena_hard_0.1"
    example = "[[A>>B]]"

    request: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 4096})

    bootstraps: int = 100
    """Resamples of the counts for the 5 % and 95 % quantiles."""
    seed: int = 0
    """The seed of the resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bootstraps < 1:
            raise UserError(f"judge.bootstraps: expected at least 1, got {self.bootstraps}")

    def _read(self, reply: Mapping[str, Any]) -> str:
        label = find_verdict(reply, VERDICT)
        if label not in COUNTS:
            raise UnreadableReply("no verdict")
        return label

    def _decide(self, games: Sequence[Game]) -> tuple[Outcome, float, list[float]]:
        counts: list[float] = []
        if all(game["verdict"] is not None for game in games):
            counts = [
                count if game["order"] == "answer first" else 1 - count
                for game in games
                for count in COUNTS[game["verdict"]]
            ]
        score = float(np.mean(counts)) if counts else float("nan")
        return decide_outcome(score), score, counts

    def _summarize(self, pairs: Sequence[Pair], judgement: Judgement) -> dict[str, Any]:
        counts = np.array([count for pair in judgement.counts or [] for count in pair])
        win_rate = low = high = None
        if judgement.facts["reason"] is None and len(counts):
            win_rate = 100 * float(counts.mean())
            low, high = (100 * quantile for quantile in bootstrap_mean(counts, self.bootstraps, self.seed))
        games = judgement.games
        verdicts = [_first_count(game) for game in games if game["verdict"] not in (None, "A=B", "B=A")]
        return {
            "win_rate": win_rate,
            "win_rate_5": low,
            "win_rate_95": high,
            "bootstraps": self.bootstraps,
            "bootstrap_seed": self.seed,
            "inconsistent": sum(
                None not in (one["verdict"], other["verdict"]) and _first_count(one) != 1 - _first_count(other)
                for one, other in self._split_games(games)
            ),
            "first_shown_wins": float(np.mean(verdicts)) if verdicts else None,
        }


def bootstrap_mean(counts: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """Return the 5 % and 95 % quantiles of the mean of resampled counts [n].

    As in the benchmark, single counts are resampled and not pairs.
    """
    index = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    low, high = np.quantile(counts[index].mean(axis=1), [0.05, 0.95])
    return float(low), float(high)


def _first_count(game: Game) -> float:
    return COUNTS[game["verdict"]][0]
