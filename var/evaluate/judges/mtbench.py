"""MT-Bench's pairwise comparison (Zheng et al., arXiv 2306.05685), as in the paper's win rates; the prompt is ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from var.evaluate.judges.base import Judgement, Outcome, Pair
from var.evaluate.judges.endpoint import EndpointJudge, Game, find_verdict
from var.utils.errors import UserError

VERDICT = re.compile(r"\[\[([ABC])\]\]")
SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0, "error": float("nan")}


@dataclass(frozen=True, kw_only=True)
class MTBench(EndpointJudge):
    """Verdicts are [[A]], [[B]] or [[C]]; the one or two games of a pair make its outcome by a rule."""

    protocol = "mtbench"
    example = "[[A]]"
    settings = ("rule", "orders")

    rule: Literal["paper", "mtbench"] = "paper"
    """How two games make an outcome; see `combine_games`."""
    orders: Literal["both", "random"] = "both"
    """See EndpointJudge."""
    request: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 2048})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("paper", "mtbench") or self.orders not in ("both", "random"):
            raise UserError("judge.rule: expected paper or mtbench. judge.orders: expected both or random.")

    def _read(self, reply: Mapping[str, Any]) -> str:
        return find_verdict(reply, VERDICT)

    def _decide(self, games: Sequence[Game]) -> tuple[Outcome, float, None]:
        outcome = combine_games([_outcome(game) for game in games], self.rule)
        return outcome, SCORES[outcome], None

    def _summarize(self, pairs: Sequence[Pair], judgement: Judgement) -> dict[str, Any]:
        outcomes = [{_outcome(game) for game in games} for games in self._split_games(judgement.games)]
        decided = [game["verdict"] for game in judgement.games if game["verdict"] in ("A", "B")]
        return {
            "inconsistent": sum("error" not in kinds and len(kinds) > 1 for kinds in outcomes),
            "first_shown_wins": decided.count("A") / len(decided) if decided else None,
        }


def combine_games(games: Sequence[Outcome], rule: Literal["paper", "mtbench"]) -> Outcome:
    """Return a pair's outcome from its one or two games; one game in error makes the pair an error.

    paper (arXiv 2502.11026, §4.1): the side with more won games wins, so a win and a tie is a win. mtbench (Zheng et
    al., 2023): games that disagree are a tie, also a win and a tie.
    """
    if "error" in games:
        return "error"
    if rule == "mtbench" and len(set(games)) > 1:
        return "tie"
    balance = games.count("win") - games.count("loss")
    return "win" if balance > 0 else "loss" if balance < 0 else "tie"


def _outcome(game: Game) -> Outcome:
    """Return the outcome of a game for the answer."""
    if game["verdict"] is None:
        return "error"
    if game["verdict"] == "C":
        return "tie"
    return "win" if (game["verdict"] == "A") == (game["order"] == "answer first") else "loss"
