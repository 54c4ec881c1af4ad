"""One evaluation: a model's answers to prompts of several subsets, what they are worth, and what that depends on."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from var.annotate.annotator import Annotator
from var.annotate.reference_logps import reference_logps
from var.annotate.responses import sample_responses
from var.annotate.rewards import score
from var.data.rows import Message, Row, Rows
from var.evaluate import diversity, lengths
from var.evaluate.answers import response_tokens
from var.evaluate.judges.base import Judge, Pair, rates, unjudged
from var.rewards.base import Reward
from var.rewards.scale import Scale
from var.sampling.base import Sampling
from var.utils.console import say, stage, warn
from var.utils.errors import Problems

Texts = list[list[tuple[str, bool]]]  # of each prompt, one (text, finished) a seed


def subsets(rows: Rows, name: str) -> np.ndarray:
    """[P] the subset of each row; where the data tells none apart, `name`."""
    return np.array([subset or name for subset in rows.table["subset"]])


def draw(rows: Rows, labels: np.ndarray, prompts: int | None, seed: int) -> np.ndarray:
    """[n] rows: one of each distinct prompt, at most `prompts` of a subset, by a seeded shuffle."""
    first = np.sort(np.unique(rows.keys, return_index=True)[1])
    if prompts is None:
        return first
    shuffled = np.random.default_rng(seed).permutation(first)
    return np.sort(np.concatenate([shuffled[labels[shuffled] == name][:prompts] for name in np.unique(labels)]))


def answers(annotator: Annotator, rows: Rows, sampling: Sampling, seeds: Sequence[int], title: str) -> Texts:
    """One answer a prompt and seed, from the store where it holds them."""
    drawn = [sample_responses(annotator, rows, replace(sampling, seed=seed), f"{title}, seed {seed}") for seed in seeds]
    return [[one[i][0] for one in drawn] for i in range(len(rows))]


@dataclass(frozen=True)
class Stored:
    """A reward whose scores come from the annotator's store where it holds them: for a judge by reward."""

    annotator: Annotator
    reward: Reward

    scores_text = True

    @property
    def identity(self) -> dict[str, Any]:
        return self.reward.identity

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        triples = list(zip(prompts, responses, answers, strict=True))
        scored: list[float] = score(replace(self.annotator, reward=self.reward), triples, "Judging").tolist()
        return scored


def scores(annotator: Annotator, reward: Reward, rows: Rows, texts: Texts, title: str) -> np.ndarray:
    """[P, S] raw rewards, from the store where it holds them."""
    triples = [(row.prompt, text, row.answer) for row, several in zip(rows, texts, strict=True) for text, _ in several]
    return score(replace(annotator, reward=reward), triples, title).reshape(len(texts), -1)


def given(file: Rows, rows: Rows, replicates: int, name: str) -> Texts:
    """The answers that a file's rows hold, found by prompt, one a replicate; all that is amiss is one error.

    What sample.py left out as empty is an empty answer here: the row says how many were sampled.
    """
    places: dict[bytes, list[int]] = defaultdict(list)
    for at, key in enumerate(file.keys):
        places[bytes(key)].append(at)
    problems, texts = Problems(f"answers={name} does not answer these prompts", shown=5), []
    for row, key in zip(rows, rows.keys, strict=True):
        several: list[tuple[str, bool]] = []
        for one in (file[at] for at in places.get(bytes(key), ())):
            several += [(response.text, response.finished) for response in one.responses]
            several += [("", True)] * (_sampled(one) - len(one.responses))
        if len(several) != replicates:
            problems.add(f"row {row.id}", f"{len(several) or 'no'} answers, and seeds asks for {replicates}")
        texts.append(several)
    problems.check(
        "Set seeds to as many numbers as there are answers a prompt. The prompts are those of data=; those of the file "
        f"itself are data=files data.path={name} held_out=false."
    )
    unused = len(file) - sum(len(places[key]) for key in {bytes(key) for key in rows.keys})
    if unused:
        say(f"{unused} of {len(file)} rows of {name} answer other prompts")
    return texts


def _sampled(row: Row) -> int:
    """How many responses sample.py drew for this row; 0 where another hand wrote it."""
    try:
        return int(json.loads(row.sampling or "")["sampling"]["responses"])
    except (ValueError, TypeError, LookupError):
        return 0


@dataclass
class _Tokens:
    """Answers as the engine takes them: prompt and response tokens, an empty answer as its end token alone.

    size: [n] tokens of the answers' text, the end token not counted.
    """

    ids: list[list[int]]
    start: np.ndarray
    length: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def tokens(self, index: int) -> tuple[list[int], int, str]:
        return self.ids[index], int(self.start[index]), ""


def tokens(annotator: Annotator, rows: Rows, texts: Texts) -> _Tokens:
    chat, ids, start, size = annotator.chat, [], [], []
    for row, several in zip(rows, texts, strict=True):
        prompt = chat.prompt(row.prompt)
        for text, finished in several:
            response = response_tokens(chat, text, finished)
            ids.append([*prompt, *response])
            start.append(len(prompt))
            size.append(len(response_tokens(chat, text, True)) - 1)
    starts = np.array(start)
    return _Tokens(ids, starts, np.array(list(map(len, ids))) - starts, np.array(size))


def logps(annotator: Annotator, encoded: _Tokens) -> np.ndarray:
    """[P · S] nats: the annotator's model's log-probability of each answer, summed over tokens.

    The answers' text is tokenised again, which may differ from the tokens that were sampled.
    """
    values = reference_logps(annotator, encoded)  # type: ignore[arg-type]
    return np.array([sum(several) for several in values.to_pylist()])


def estimate(values: np.ndarray) -> dict[str, Any]:
    """Of [P, S]: the mean, its standard error over the S seeds and, clustered, over the P prompts."""
    seeds = values.mean(0)
    return {
        "mean": float(values.mean()),
        "se_seeds": float(seeds.std(ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else None,
        "se_prompts": lengths.estimate(values)["se"],
        "by_seed": seeds.tolist(),
    }


def average(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of subsets' estimates, each subset counting once, as the paper's tables have it."""
    by_seed = np.array([part["by_seed"] for part in parts]).mean(0)
    errors = [part["se_prompts"] for part in parts]
    known = all(error is not None for error in errors)
    return {
        "mean": float(by_seed.mean()),
        "se_seeds": float(by_seed.std(ddof=1) / np.sqrt(len(by_seed))) if len(by_seed) > 1 else None,
        "se_prompts": float(np.sqrt(np.square(errors).sum()) / len(errors)) if known else None,
        "by_seed": by_seed.tolist(),
    }


def measure(
    labels: np.ndarray, texts: Texts, sizes: np.ndarray, values: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Of each subset: prompts, every [P, S] of `values` (rewards, KL) as an estimate, lengths, repetition, diversity.

    A reward is given raw and as 100·sigmoid, the scale on which the paper's tables seem to stand.
    """
    finished = np.array([[done for _, done in several] for several in texts])
    sigmoid = Scale(kind="sigmoid")
    out: dict[str, dict[str, Any]] = {}
    for name in np.unique(labels):
        here = labels == name
        part = [[text for text, _ in several] for several, inside in zip(texts, here, strict=True) if inside]
        out[str(name)] = {
            "prompts": int(here.sum()),
            **{key: estimate(value[here]) for key, value in values.items()},
            **{
                f"{key}_sigmoid": estimate(100 * sigmoid(value[here]))
                for key, value in values.items()
                if "reward" in key
            },
            "length": lengths.distribution(sizes[here].astype(float)),
            **diversity.describe(part, finished[here]),
        }
    return out


def averages(measured: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Means over subsets, of those that are there: `of` names them, `without` the others."""
    out = {}
    for name, members in wanted.items():
        there = [measured[member] for member in members if member in measured]
        if there:
            keys = [key for key, value in there[0].items() if isinstance(value, dict) and "by_seed" in value]
            out[name] = {
                "of": [member for member in members if member in measured],
                "without": [member for member in members if member not in measured],
                **{key: average([part[key] for part in there]) for key in keys},
            }
    return out


def compare(
    labels: np.ndarray, gain: np.ndarray, sizes: np.ndarray, opponent_sizes: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Of each subset: the gain in reward, paired, as it is, at equal length by regression, and at matched lengths."""
    difference = (sizes - opponent_sizes).astype(float)
    return {
        str(name): {
            "gain": estimate(gain[labels == name]),
            "length_controlled": lengths.length_controlled(gain[labels == name], difference[labels == name]),
            "matched_lengths": lengths.matched(
                gain[labels == name], sizes[labels == name].astype(float), opponent_sizes[labels == name].astype(float)
            ),
        }
        for name in np.unique(labels)
    }


def judged(
    judge: Judge,
    rows: Rows,
    labels: np.ndarray,
    texts: Texts,
    opponents: Texts,
    limit: int | None,
    seeds: Sequence[int],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Win rates against the opponents' answers, and one record a game."""
    pairs, seen = [], dict.fromkeys(labels.tolist(), 0)
    for row, label, several, other in zip(rows, labels.tolist(), texts, opponents, strict=True):
        seen[label] += 1
        if limit is None or seen[label] <= limit:
            for s, seed in enumerate(seeds):
                pairs.append(
                    Pair(
                        id=row.id, subset=label, seed=seed, prompt=row.prompt, gold=row.answer,
                        answer=several[s][0], opponent=other[s][0],
                    )
                )  # fmt: skip
    say(f"Judge: {judge.describe(pairs)}")
    with stage("Judging", len(pairs), "pairs") as advance:
        judgement = judge(pairs, advance)
    rated = rates(judgement, pairs)
    if reason := unjudged(rated["all"], judgement.facts):
        warn(reason)
    elif reason := judgement.facts.get("lc_reason"):
        warn(f"no length-controlled win rate: {reason}")
    return {**rated, "facts": judgement.facts}, judgement.games
