"""Judges: which of two answers is better, by a language model's verdicts or by a reward; rules, games, win rates."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from var.data.rows import Message
from var.rewards.base import Reward, compute_scores
from var.utils.errors import Problems, UserError
from var.utils.files import replace_surrogates
from var.utils.http_client import Client, Failure, count_items, find_missing_text, get_text
from var.utils.provenance import hash_content
from var.utils.statistics import clustered_error

Outcome = Literal["win", "tie", "loss", "error"]


@dataclass(frozen=True)
class Pair:
    """An answer and its opponent under one prompt. seed: which replicate the answer is of; gold: the row's `answer`."""

    id: str
    subset: str | None
    seed: int
    prompt: tuple[Message, ...]
    answer: str
    opponent: str
    gold: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What a judge says of n pairs.

    outcomes: [n] of `answer` against `opponent`. scores: [n] in [0, 1]: 1, 0.5, 0 or a graded preference; NaN where it
    is an error. games: one JSON record a game, enough to compute any table again. facts: protocol, template, model,
    errors by kind, usage, and the protocol's own numbers; JSON values. counts: of each pair, what the protocol's win
    rate is the mean of, in [0, 1]; None: 1 of a win and 0 of any other outcome.
    """

    outcomes: list[Outcome]
    scores: np.ndarray
    games: list[dict[str, Any]]
    facts: dict[str, Any]
    counts: list[list[float]] | None = None


class Judge(Protocol):
    """check: what the user can mend, before anything is asked; describe: what the pairs will cost."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def check(self) -> None: ...

    def describe(self, pairs: Sequence[Pair]) -> str: ...

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement: ...


def decide(games: Sequence[Outcome], rule: Literal["paper", "mtbench"]) -> Outcome:
    """A pair's outcome from its one or two games; one game in error makes the pair an error.

    paper (arXiv 2502.11026, §4.1): the side with more won games wins, so a win and a tie is a win. mtbench (Zheng et
    al., 2023): games that disagree are a tie, a win and a tie too.
    """
    if "error" in games:
        return "error"
    if rule == "mtbench" and len(set(games)) > 1:
        return "tie"
    ahead = games.count("win") - games.count("loss")
    return "win" if ahead > 0 else "loss" if ahead < 0 else "tie"


def rates(judgement: Judgement, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Win rates of each subset, over all pairs, and the mean of the subsets' as in the paper; None where undefined.

    win_rate: the protocol's, in %: the mean of `counts`, or else wins over judged pairs, where ties are no wins; errors
    are left out and counted. mean_score: in [0, 1], ties count half. se_prompts: standard error of win_rate, clustered
    by prompt id; se_seeds: standard deviation of the seeds' win rates over √seeds. Above the share facts["max_errors"]
    of errors there is no win rate but a `reason`.
    """
    members: dict[str, list[int]] = defaultdict(list)
    if any(pair.subset is not None for pair in pairs):
        for i, pair in enumerate(pairs):
            members["without subset" if pair.subset is None else pair.subset].append(i)
    limit = judgement.facts["max_errors"]
    subsets = {name: _rate(judgement, pairs, index, limit) for name, index in sorted(members.items())}
    over_all = _rate(judgement, pairs, range(len(pairs)), limit)
    parts = list(subsets.values()) or [over_all]
    by_seed = [part.pop("by_seed") for part in parts]
    over_all.pop("by_seed", None)
    means = [_mean(values) for values in zip(*by_seed, strict=True)]
    return {
        "subsets": subsets,
        "all": over_all,
        "average": _mean([part["win_rate"] for part in parts]),
        "average_se_seeds": _error(means),
    }


def _rate(judgement: Judgement, pairs: Sequence[Pair], index: Sequence[int], limit: float) -> dict[str, Any]:
    judged = [i for i in index if judgement.outcomes[i] != "error"]
    outcomes = Counter(judgement.outcomes[i] for i in index)
    counts = judgement.counts or [[float(outcome == "win")] for outcome in judgement.outcomes]
    won = np.array([100 * count for i in judged for count in counts[i]])
    of = [pairs[i] for i in judged for _ in counts[i]]
    reason = too_many([judgement.outcomes[i] for i in index], limit)
    given = reason is None and len(judged) > 0
    by_seed = [
        _mean([value for pair, value in zip(of, won.tolist(), strict=True) if pair.seed == seed]) if given else None
        for seed in sorted({pair.seed for pair in pairs})
    ]
    return {
        "n": len(index),
        **{outcome: outcomes[outcome] for outcome in ("win", "tie", "loss", "error")},
        "win_rate": float(won.mean()) if given else None,
        "mean_score": float(judgement.scores[judged].mean()) if given else None,
        "se_prompts": clustered_error(won, [pair.id for pair in of]) if given else None,
        "se_seeds": _error(by_seed),
        "reason": reason,
        "by_seed": by_seed,
    }


def too_many(outcomes: Sequence[Outcome], limit: float) -> str | None:
    """Why there is no win rate, where more than the share `limit` of the pairs is in error."""
    errors = outcomes.count("error")
    if errors <= limit * len(outcomes):
        return None
    return (
        f"{errors} of {len(outcomes)} pairs are in error, more than max_errors={limit:g} allows; what fails is not a "
        "random part, so the rest gives no win rate"
    )


def unjudged(rated: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """Why there is no win rate over all pairs, of `rates` and the judgement's facts; None where there is one."""
    if rated["win_rate"] is not None:
        return None
    kinds = ", ".join(f"{number} {kind}" for kind, number in facts.get("errors", {}).items())
    first = facts.get("first_failure")
    return (
        f"no win rate by the judge: {rated['reason'] or 'no pair was judged'}"
        + (f". Of the games: {kinds}" if kinds else "")
        + (f". The first that failed: {first}" if first else "")
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _error(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < 2 or len(known) < len(values):
        return None
    return float(np.std(known, ddof=1) / math.sqrt(len(known)))


PLACES = {
    name: place
    for place, names in {
        "question": ("question", "question_1", "QUESTION", "instruction"),
        "a": ("answer_a", "answer_1", "ANSWER_A", "output_1"),
        "b": ("answer_b", "answer_2", "ANSWER_B", "output_2"),
    }.items()
    for name in names
}  # {question}, {answer_a}, {answer_b}, and what the three benchmarks' own files call them


PLACE = re.compile(r"\{(" + "|".join(PLACES) + r")\}")


TURN = re.compile(r"<\|im_start\|>(system|user)\n(.*?)\n?<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True)
class Template:
    """A judge's prompt; `user` holds {question}, {answer_a} and {answer_b}."""

    system: str | None
    user: str

    @property
    def hash(self) -> str:
        return hash_content(self.system, self.user).hex()

    def messages(self, prompt: Sequence[Message], a: str, b: str) -> list[dict[str, str]]:
        """The texts are put in as they are, in one pass: braces in an answer stay what they are."""
        values = {"question": question(prompt), "a": a, "b": b}
        filled = PLACE.sub(lambda match: values[PLACES[match[1]]], self.user)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": filled}]


ASSISTANTS = (
    "===== Answer of assistant A =====\n{answer_a}\n===== End of answer A =====\n\n"
    "===== Answer of assistant B =====\n{answer_b}\n===== End of answer B ====="
)  # how our own wordings show the two answers


def question(prompt: Sequence[Message]) -> str:
    """A single message as it is; a conversation as a transcript with its roles."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    turns = [f"[{message['role'].capitalize()}]\n{message['content']}" for message in prompt]
    return "\n\n".join(["This is a conversation; the two answers reply to its last message.", *turns])


def read_template(path: str | None, default: Template, verdict: str) -> Template:
    """`default`, or the one in a file: FastChat's judge_prompts.jsonl (its entry pair-v2), Arena-Hard's
    judge_config.yaml, or text, with a system message where it is marked as in AlpacaEval's (<|im_start|>system).

    verdict: what the judge must be told to write, or its replies could not be read.
    """
    if path is None:
        return default
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        template = _parsed(Path(path).suffix, text)
    except (OSError, UnicodeDecodeError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"judge.template={path} cannot be used: {type(error).__name__}: {error}") from error
    problems = Problems(f"judge.template={path} cannot be used")
    for place, name in (("question", "question"), ("a", "answer_a"), ("b", "answer_b")):
        if place not in {PLACES[found] for found in PLACE.findall(template.user)}:
            problems.add(f"{{{name}}}", "does not occur in it")
    if verdict not in f"{template.system}\n{template.user}":
        problems.add(verdict, "does not occur in it, so the judge would not know how to write its verdict")
    problems.check()
    return template


def _parsed(suffix: str, text: str) -> Template:
    if suffix == ".jsonl":
        entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        entry = {entry["name"]: entry for entry in entries}["pair-v2"]
        return Template(system=entry["system_prompt"], user=entry["prompt_template"])
    if suffix in (".yaml", ".yml"):
        import yaml

        entry = yaml.safe_load(text)
        user = entry["prompt_template"]
        return Template(system=entry["system_prompt"], user=user if isinstance(user, str) else user[0])
    turns = dict(TURN.findall(text))
    return Template(system=turns.get("system"), user=turns.get("user", text))


class Unread(Exception):
    """A reply that holds no verdict; its text is the kind of error."""


@dataclass(frozen=True)
class Games:
    """The games of all pairs, asked in one go. orders: both, or random: one game, its order by the pair's content.

    request: further fields of the chat completion's body; one that is None is left out.
    """

    client: Client
    template: Template
    request: Mapping[str, Any]
    orders: Literal["both", "random"]

    def each(self, pairs: Sequence[Pair]) -> list[tuple[int, bool]]:
        """(pair, whether its answer is shown first) of every game; the games of a pair stand together."""
        if self.orders == "both":
            return [(i, first) for i in range(len(pairs)) for first in (True, False)]
        return [(i, hash_content(p.prompt, p.answer, p.opponent)[0] % 2 == 0) for i, p in enumerate(pairs)]

    def bodies(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        options = {key: value for key, value in self.request.items() if value is not None}
        bodies = []
        for i, first in self.each(pairs):
            shown = (pairs[i].answer, pairs[i].opponent) if first else (pairs[i].opponent, pairs[i].answer)
            bodies.append({"messages": self.template.messages(pairs[i].prompt, *shown), **options})
        return bodies

    def describe(self, pairs: Sequence[Pair]) -> str:
        longest = self.request.get("max_tokens") or self.request.get("max_completion_tokens") or 0
        return self.client.estimate(self.bodies(pairs), tokens_out=longest)

    def play(
        self, pairs: Sequence[Pair], read: Callable[[dict[str, Any]], Any], advance: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        """One JSON record a game. read: a reply's verdict, as of the answer shown first, or Unread.

        advance: called with the pairs that are done, not with the games.
        """
        bodies, order = self.bodies(pairs), self.each(pairs)
        records = []
        replies = self.client.ask(bodies, advance=count_items(advance, self._size), find_fault=_useless)
        for (i, first), body, reply in zip(order, bodies, replies, strict=True):
            record: dict[str, Any] = {
                "id": pairs[i].id, "subset": pairs[i].subset, "seed": pairs[i].seed,
                "order": "answer first" if first else "opponent first",
                "prompt": hash_content(body["messages"]).hex(),
                "verdict": None, "error": None, "text": None, "usage": None,
            }  # fmt: skip
            if isinstance(reply, Failure):
                record.update(error="failed", text=replace_surrogates(reply.reason))
            else:
                record.update(text=get_text(reply), usage=reply.get("usage"))
                try:
                    record["verdict"] = read(reply)
                except Unread as kind:
                    record["error"] = str(kind)
            records.append(record)
        return records

    def by_pair(self, records: Sequence[Any]) -> list[Sequence[Any]]:
        return [records[at : at + self._size] for at in range(0, len(records), self._size)]

    @property
    def _size(self) -> int:
        """Games of a pair."""
        return 2 if self.orders == "both" else 1


def _useless(reply: Mapping[str, Any]) -> str | None:
    """Why a reply is not worth keeping: it holds no words of the judge, such as some gateways' errors."""
    try:
        graded = bool(reply["choices"][0]["logprobs"])
    except (LookupError, TypeError):
        graded = False
    return None if graded else find_missing_text(reply)


def verdict(reply: Mapping[str, Any], pattern: re.Pattern[str]) -> str:
    """The one kind of verdict in a reply; none, or two that differ, is Unread."""
    text = get_text(reply)
    if text is None:
        raise Unread("no text")
    found = set(pattern.findall(text))
    if len(found) > 1:
        raise Unread("several verdicts")
    if not found:
        raise Unread("cut off" if reply["choices"][0].get("finish_reason") == "length" else "no verdict")
    return str(found.pop())


def facts(
    identity: Mapping[str, Any], outcomes: Sequence[Outcome], games: Sequence[Mapping[str, Any]], max_errors: float
) -> dict[str, Any]:
    """What every judge by verdicts reports beside its own numbers."""
    failed = [game["text"] for game in games if game["error"] == "failed"]
    return {
        **identity,
        "pairs": len(outcomes),
        "games": len(games),
        "errors": dict(Counter(game["error"] for game in games if game["error"] is not None)),
        "first_failure": failed[0] if failed else None,
        "max_errors": max_errors,
        "reason": too_many(outcomes, max_errors),
    }


def spent(client: Client, before: Mapping[str, float]) -> dict[str, float]:
    """The client's counters since `before`."""
    return {name: value - before[name] for name, value in asdict(client.usage).items()}


def check_max_errors(name: str, value: float) -> None:
    """UserError where it is no share."""
    if not 0 <= value <= 1:
        raise UserError(f"judge.max_errors of {name} is a share of the pairs, 0 to 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class RewardJudge:
    """The answer that a reward scores higher wins, where it is ahead by more than `margin`, in reward units."""

    reward: Reward
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"judge.margin is how far rewards must differ, at least 0, got {self.margin}")

    @property
    def identity(self) -> dict[str, Any]:
        return {"protocol": "reward", "version": 1, "reward": self.reward.identity, "margin": self.margin}

    def check(self) -> None:
        if not self.reward.scores_text:
            raise UserError(
                "judge=reward needs a reward that can score new text, and this one only reads the data's scores; "
                "choose another, as reward=offsetbias-rm-8b"
            )
        self.identity  # noqa: B018  a missing package or model is told now

    def describe(self, pairs: Sequence[Pair]) -> str:
        return f"{2 * len(pairs)} answers to be scored"

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement:
        rewards = np.empty((len(pairs), 2))
        for begin in range(0, len(pairs), 64):
            part = pairs[begin : begin + 64]
            for side, texts in enumerate(([p.answer for p in part], [p.opponent for p in part])):
                numbers = compute_scores(self.reward, [p.prompt for p in part], texts, [p.gold for p in part])
                rewards[begin : begin + 64, side] = numbers
            advance(len(part))
        problems = Problems("rewards that are not finite")
        for i in np.flatnonzero(~np.isfinite(rewards).all(axis=1)).tolist():
            problems.add(f"pair {pairs[i].id}, seed {pairs[i].seed}", f"{rewards[i, 0]} against {rewards[i, 1]}")
        problems.check()
        ahead = rewards[:, 0] - rewards[:, 1]
        scores = np.where(ahead > self.margin, 1.0, np.where(ahead < -self.margin, 0.0, 0.5))
        outcomes = [outcome(score) for score in scores]
        games = [
            {"id": p.id, "subset": p.subset, "seed": p.seed, "rewards": both, "verdict": result}
            for p, both, result in zip(pairs, rewards.tolist(), outcomes, strict=True)
        ]
        own = {"pairs": len(pairs), "mean_difference": float(ahead.mean()) if len(pairs) else None}
        return Judgement(outcomes, scores, games, {**self.identity, **own, "max_errors": 0.0, "reason": None})


def outcome(score: float) -> Outcome:
    """Of a preference in [0, 1] for the answer; NaN is an error."""
    if math.isnan(score):
        return "error"
    return "win" if score > 0.5 else "loss" if score < 0.5 else "tie"
