"""AlpacaEval 2.0: graded preferences from log-probabilities, and their win rate at equal length; the prompt is ours.

Dubois et al., arXiv 2404.04475, and the package alpaca_eval 0.6.6 (annotator weighted_alpaca_eval_gpt4_turbo, GLM
length_controlled_v1), beside which the numbers are tested. Where it differs: the order of the answers is drawn from the
pair's content, and several seeds are fitted one by one and averaged.
"""

import csv
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from var.evaluate.judges.base import (
    Games,
    Judgement,
    Pair,
    Template,
    Unread,
    check_max_errors,
    facts,
    outcome,
    read_template,
    spent,
)
from var.utils.errors import Problems, UserError
from var.utils.http_client import Client
from var.utils.statistics import clustered_error

NEAR = 10  # %


MATCHED = f"win rate among pairs of lengths within ±{NEAR} %"


GAMED_WEIGHT = 0.2 / 2  # of each row of the two gamed baselines, beside 1 for a judged pair


STRENGTHS = np.logspace(-4, 4, 10)  # inverse L1 strengths tried by cross-validation


FOLDS = 5


TEMPLATE = Template(
    system=(
        "You choose between the outputs of two language models for a ranking that has to agree with what people "
        "prefer. You take no side and work with care."
    ),
    user=(
        "Below are an instruction and the outputs that two models, named m and M, gave for it. The order in which they "
        "stand means nothing. Decide which output is better: which one does what the instruction asks, correctly, and "
        "as a person who reads both would wish.\n\n"
        "===== Instruction =====\n{question}\n\n"
        "===== Output of m =====\n{answer_a}\n===== End of the output of m =====\n\n"
        "===== Output of M =====\n{answer_b}\n===== End of the output of M =====\n\n"
        "Name the model with the better output. Write its name and nothing else, no quotes, no space and no other "
        "sign: m or M."
    ),
)


@dataclass(frozen=True, kw_only=True)
class AlpacaEval:
    """One game a pair; the score is the answer's share of the probability of the first token, "m" against "M".

    Tokens with a space before the letter do not count, as in the package. The win rate is the mean score; `gamed`
    (df_gamed.csv of the hub's tatsu-lab/alpaca_eval) gives the length-controlled one too, with the difficulties that
    it holds or those of `difficulty` (instruction_difficulty.csv). reference: alpaca_eval.json, whose order numbers the
    instructions; without it the pairs' ids are those numbers. CSV or JSON. The rest: as in MTBench.
    """

    client: Client
    template: str | None = None
    request: Mapping[str, Any] = field(
        default_factory=lambda: {"temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    )
    reference: str | None = None
    difficulty: str | None = None
    gamed: str | None = None
    max_errors: float = 0.05

    def __post_init__(self) -> None:
        check_max_errors("alpaca_eval_2", self.max_errors)
        if self.gamed is None and (self.reference or self.difficulty):
            raise UserError(
                "judge.reference and judge.difficulty serve the length-controlled win rate, which needs judge.gamed "
                "too: the path of df_gamed.csv"
            )

    @cached_property
    def _games(self) -> Games:
        return Games(self.client, read_template(self.template, TEMPLATE, "M"), self.request, "random")

    @cached_property
    def _gamed(self) -> "Gamed":
        return read_gamed(str(self.gamed))

    @cached_property
    def _difficulty(self) -> dict[int, float]:
        if self.difficulty is None:
            return self._gamed.by_index
        return read_difficulty(self.difficulty)

    @cached_property
    def _reference(self) -> dict[str, list[int]]:
        return read_reference(str(self.reference))

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "protocol": "alpaca_eval_2", "version": 1, **self.client.identity, "request": dict(self.request),
            "template": self._games.template.hash, "length_control": self.gamed is not None,
        }  # fmt: skip

    def check(self) -> None:
        self._games  # noqa: B018  reads the template
        if self.gamed is not None:
            _logistic_regression()
            self._gamed, self._difficulty  # noqa: B018
            if self.reference is not None:
                self._reference  # noqa: B018
        self.client.check()

    def describe(self, pairs: Sequence[Pair]) -> str:
        self._difficulties(pairs)
        return self._games.describe(pairs)

    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None]) -> Judgement:
        difficulties = self._difficulties(pairs)
        before = asdict(self.client.usage)
        games = self._games.play(pairs, preference, advance)
        scores = np.array([_seen(game) for game in games])
        outcomes = [outcome(score) for score in scores]
        shared = facts(self.identity, outcomes, games, self.max_errors)
        given = shared["reason"] is None
        own: dict[str, Any] = {"usage": spent(self.client, before), **win_rate(pairs, scores, given)}
        if difficulties is not None:
            own |= self._controlled(pairs, scores, difficulties) if given else {"lc_win_rate": None}
        return Judgement(outcomes, scores, games, {**shared, **own}, [[score] for score in scores.tolist()])

    def _difficulties(self, pairs: Sequence[Pair]) -> np.ndarray | None:
        """[n] each pair's difficulty; pairs that the files do not hold are one error."""
        if self.gamed is None:
            return None
        problems = Problems("pairs that AlpacaEval's files do not hold")
        found: dict[str, float] = {}
        met: Counter[str] = Counter()
        for pair in pairs:
            if pair.id in found:
                continue
            found[pair.id] = math.nan
            text = pair.prompt[-1]["content"].strip()
            places = self._reference.get(text, []) if self.reference else _number(pair.id)
            if not places:
                problems.add(pair.id, "its instruction is not in judge.reference" if self.reference else "is no number")
                continue
            place = places[min(met[text], len(places) - 1)]  # an instruction that stands there twice has two numbers
            met[text] += 1
            if place not in self._difficulty:
                problems.add(pair.id, f"instruction {place} has no difficulty")
            found[pair.id] = self._difficulty.get(place, math.nan)
        problems.check(
            "The length-controlled win rate is of AlpacaEval's own instructions. For others leave out judge.gamed; "
            "where the ids are not the instructions' numbers, set judge.reference to alpaca_eval.json."
        )
        return np.array([found[pair.id] for pair in pairs])

    def _controlled(self, pairs: Sequence[Pair], scores: np.ndarray, difficulties: np.ndarray) -> dict[str, Any]:
        """Each seed is a fit of its own; the rates are averaged."""
        members: dict[int, list[int]] = defaultdict(list)
        for i, pair in enumerate(pairs):
            members[pair.seed].append(i)
        found = []
        longer = longer_opponent(pairs)
        for index in members.values():
            if np.ptp(longer[index]) == 0 or np.isnan(scores[index]).all():
                return {
                    "lc_win_rate": None,
                    "lc_reason": "a seed has no judged pair, or none whose length difference is another",
                }
            found.append(length_controlled(scores[index], longer[index], difficulties[index], self._gamed))
        predicted = np.concatenate([fit.predicted for fit in found])
        return {
            "lc_win_rate": 100 * float(np.mean([fit.predicted.mean() for fit in found])),
            "lc_se": _percent(clustered_error(predicted, [pairs[i].id for index in members.values() for i in index])),
            "lc_weights": [dict(zip(FEATURES, fit.weights.tolist(), strict=True)) for fit in found],
            "lc_strength": [fit.strength for fit in found],
            "gamed_rows": len(self._gamed.preference),
            "gamed_rows_without_preference": self._gamed.left_out,
        }


def preference(reply: Mapping[str, Any]) -> float:
    """p(m) / (p(m) + p(M)) of the first token, in [0, 1]: the preference for the answer that was shown first."""
    try:
        top = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logs = {one["token"]: float(one["logprob"]) for one in top}
    except (LookupError, TypeError, ValueError):
        raise Unread("no log-probabilities") from None
    m, other = logs.get("m", -math.inf), logs.get("M", -math.inf)
    peak = max(m, other)
    if not peak > -math.inf:
        raise Unread("neither m nor M")
    mass = math.exp(m - peak), math.exp(other - peak)
    return mass[0] / sum(mass)


def _seen(game: Mapping[str, Any]) -> float:
    """The preference for the answer; NaN of a game in error."""
    value = game["verdict"]
    if value is None:
        return math.nan
    return float(value if game["order"] == "answer first" else 1 - value)


def longer_opponent(pairs: Sequence[Pair]) -> np.ndarray:
    """[n] how many characters the opponent has more than the answer."""
    return np.array([len(pair.opponent) - len(pair.answer) for pair in pairs], dtype=float)


def win_rate(pairs: Sequence[Pair], scores: np.ndarray, given: bool) -> dict[str, Any]:
    """The mean score in %, with its error by prompt, and the same among pairs of nearly equal length.

    The second is no length-controlled win rate: pairs of equal length are another sample than all pairs.
    """
    judged = ~np.isnan(scores)
    lengths = np.array([len(pair.opponent) for pair in pairs])
    near = judged & (100 * np.abs(longer_opponent(pairs)) <= NEAR * lengths)
    ids = np.array([pair.id for pair in pairs])

    def rate(chosen: np.ndarray) -> float | None:
        return 100 * float(scores[chosen].mean()) if given and chosen.any() else None

    error = clustered_error(scores[judged], ids[judged].tolist()) if given and judged.any() else None
    return {
        "win_rate": rate(judged),
        "win_rate_se": _percent(error),
        MATCHED: {"win_rate": rate(near), "n": int(near.sum())},
    }


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


class Gamed(NamedTuple):
    """Judged answers of baselines that game the length. preference [G] in [0, 1]; shorter [G], the standardised length
    difference; difficulty [G]; by_index: each instruction's; left_out: rows without a preference."""

    preference: np.ndarray
    shorter: np.ndarray
    difficulty: np.ndarray
    by_index: dict[int, float]
    left_out: int = 0


class Fit(NamedTuple):
    """predicted [n]: preferences at equal length. weights [3] of FEATURES. strength: the inverse L1 strength chosen."""

    predicted: np.ndarray
    weights: np.ndarray
    strength: float


FEATURES = ("length", "difficulty", "model")


def length_controlled(scores: np.ndarray, longer: np.ndarray, difficulty: np.ndarray, gamed: Gamed) -> Fit:
    """The preferences that a logistic regression predicts for these pairs if both answers were equally long.

    log-odds of preference = w_0 tanh(longer/sd) + w_1 difficulty + w_2 [no gamed row], L1-penalised, without an
    intercept; sd: of these pairs' length differences. The gamed rows tie w_0 and w_1 down. Folds keep the two copies of
    a row, one for each side of its preference, together. scores [n], NaN where there is none: such a pair is predicted
    and not fitted; longer [n] in characters; difficulty [n]. Dubois et al., arXiv 2404.04475.
    """
    from sklearn.model_selection import GroupKFold

    estimator = _logistic_regression()
    n = len(scores)
    ours = np.column_stack([np.tanh(longer / longer.std(ddof=1)), difficulty, np.ones(n)])
    theirs = np.column_stack([np.tanh(gamed.shorter), gamed.difficulty, np.zeros(len(gamed.preference))])
    target = np.concatenate([gamed.preference, scores])
    known = ~np.isnan(target)
    x = np.concatenate([theirs, ours])[known]
    weight = np.concatenate([np.full(len(theirs), GAMED_WEIGHT), np.ones(n)])[known]
    target = target[known]

    # a graded preference p is a row that won with weight p and its copy that lost with weight 1 − p
    twice, won = np.concatenate([x, x]), np.repeat([1, 0], len(x))
    share, weight = np.concatenate([target, 1 - target]), np.concatenate([weight, weight])
    rows = np.tile(np.arange(len(x)), 2)

    def fitted(strength: float, index: Any) -> Any:
        model = estimator(
            C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=123, tol=1e-4
        )  # the seed and the tolerance are the package's: liblinear visits the coordinates at random
        return model.fit(twice[index], won[index], sample_weight=(share * weight)[index])

    def loss(model: Any, index: np.ndarray) -> float:
        odds = twice[index] @ model.coef_[0]
        p = np.where(won[index] == 1, share[index], 1 - share[index])
        return float(np.mean(weight[index] * (p * np.logaddexp(0, -odds) + (1 - p) * np.logaddexp(0, odds))))

    folds = list(GroupKFold(n_splits=FOLDS).split(twice, won, rows))
    losses = [[loss(fitted(strength, train), test) for train, test in folds] for strength in STRENGTHS]
    best = float(STRENGTHS[int(np.argmin(np.mean(losses, axis=1)))])
    weights = fitted(best, slice(None)).coef_[0]
    equal = ours * np.array([0.0, 1.0, 1.0])
    return Fit(1 / (1 + np.exp(-(equal @ weights))), weights, best)


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("the length-controlled win rate needs an extra: pip install -e '.[eval]'") from error
    return LogisticRegression


def _records(key: str, path: str) -> Iterator[tuple[str, Any]]:
    """(where, record) of a CSV with a header or of a JSON list; another form is a UserError."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        records = list(csv.DictReader(io.StringIO(text))) if Path(path).suffix == ".csv" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"judge.{key}={path} cannot be read: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records) or not records:
        raise UserError(f"judge.{key}={path} cannot be read: it is no table and no list of objects")
    for at, record in enumerate(records):
        yield f"{Path(path).name}, record {at}", record


def read_gamed(path: str) -> Gamed:
    """df_gamed.csv: index, preference (in [0, 1], or empty), std_delta_len, instruction_difficulty."""
    problems = Problems(f"judge.gamed={path} cannot be used")
    table, by_index, left_out = [], dict[int, float](), 0
    for where, record in _records("gamed", path):
        try:
            length, difficulty = float(record["std_delta_len"]), float(record["instruction_difficulty"])
            preferred = float(record["preference"]) if record["preference"] not in ("", None) else math.nan
            index = int(record["index"])
        except (KeyError, TypeError, ValueError) as error:
            problems.add(where, f"no column {error}" if isinstance(error, KeyError) else str(error))
            continue
        if not (math.isfinite(length) and math.isfinite(difficulty)) or preferred < 0 or preferred > 1:
            problems.add(where, f"preference {preferred} is not in [0, 1], or a number is not finite")
        if str(record.get("not_gamed_baseline", False)) not in ("False", "false", "0"):
            problems.add(where, "not_gamed_baseline is true, but this file is of the gamed baselines")
        by_index.setdefault(index, difficulty)
        left_out += math.isnan(preferred)
        if not math.isnan(preferred):
            table.append((preferred, length, difficulty))
    if not problems and len(table) < FOLDS:
        problems.add("rows", f"{len(table)} with a preference; {FOLDS} folds need as many")
    problems.check("It is df_gamed.csv of the hub's data set tatsu-lab/alpaca_eval.")
    preferred, length, difficulty = np.array(table).T
    return Gamed(preferred, length, difficulty, by_index, left_out)


def read_difficulty(path: str) -> dict[int, float]:
    """instruction_difficulty.csv: the instruction's number first, its difficulty next; or JSON with these names."""
    problems = Problems(f"judge.difficulty={path} cannot be used")
    found = {}
    for where, record in _records("difficulty", path):
        try:
            named = "index" in record
            number, value = (record["index"], record["instruction_difficulty"]) if named else list(record.values())[:2]
            found[int(number)] = float(value)
            if not math.isfinite(found[int(number)]):
                problems.add(where, f"the difficulty is {value}")
        except (KeyError, TypeError, ValueError) as error:
            problems.add(where, f"no column {error}" if isinstance(error, KeyError) else str(error))
    problems.check("It is instruction_difficulty.csv of the hub's data set tatsu-lab/alpaca_eval.")
    return found


def read_reference(path: str) -> dict[str, list[int]]:
    """alpaca_eval.json: the numbers, from 0, under which each instruction stands there."""
    problems = Problems(f"judge.reference={path} cannot be used")
    found: dict[str, list[int]] = defaultdict(list)
    for at, (where, record) in enumerate(_records("reference", path)):
        if isinstance(record.get("instruction"), str):
            found[record["instruction"].strip()].append(at)
        else:
            problems.add(where, "no text under `instruction`")
    problems.check("It is alpaca_eval.json of the hub's data set tatsu-lab/alpaca_eval.")
    return dict(found)


def _number(text: str) -> list[int]:
    return [int(text)] if text.isdecimal() else []
