"""Where evaluated answers come from: a model, through the annotation cache, or a file."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from var.annotate.annotator import Annotator
from var.annotate.reference_logps import reference_logps
from var.annotate.responses import open_responses, sample_responses
from var.annotate.rewards import score
from var.data.messages import Message
from var.data.row import Row
from var.data.rows import Rows
from var.models.frozen import FrozenModel
from var.rewards.base import Reward
from var.sampling.base import Sample, Samples, Sampling
from var.utils.console import say
from var.utils.errors import Problems


@dataclass(frozen=True)
class Candidate:
    """The evaluated model, or the reference; everything computed is cached."""

    name: str
    """`model` or `reference`, as in result.json."""
    model: FrozenModel
    """Its frozen weights."""
    annotator: Annotator
    """An annotator whose frozen model is this one."""

    def sample(self, rows: Rows, sampling: Sampling, seeds: Sequence[int]) -> Samples:
        """Sample one answer per prompt and seed. Print first how many answers are missing."""
        settings = [replace(sampling, seed=seed) for seed in seeds]
        tables = [open_responses(self.annotator, own) for own in settings]
        if missing := sum(int(table.missing(rows.keys).sum()) for table in tables):
            say(
                f"Answers of the {self.name}: {missing} of {len(rows) * len(seeds)} are not cached "
                f"({len(rows)} prompts, seeds {list(seeds)}, up to {sampling.max_new_tokens} tokens each)"
            )
        drawn = [
            sample_responses(self.annotator, rows, own, f"Answers of the {self.name}, seed {own.seed}", False)
            for own in settings
        ]
        self.annotator.sampler.release()
        return [[answers[i][0] for answers in drawn] for i in range(len(rows))]

    def score(self, name: str, reward: Reward, rows: Rows, samples: Samples) -> np.ndarray:
        """Return raw rewards [P, S]."""
        triples = [
            (row.prompt, sample.text, row.answer) for row, own in zip(rows, samples, strict=True) for sample in own
        ]
        scores = score(replace(self.annotator, reward=reward), triples, f"{name} of the {self.name}")
        return scores.reshape(len(samples), -1)

    def sum_logps(self, rows: Rows, samples: Samples) -> np.ndarray:
        """Return this model's log-probability of each answer [P, S], summed over its tokens, in nats."""
        chat, ids, start = self.annotator.chat, [], []
        for row, several in zip(rows, samples, strict=True):
            prompt = chat.prompt(row.prompt)
            ids += [[*prompt, *sample.tokens(chat)] for sample in several]
            start += [len(prompt)] * len(several)
        sequences = _Sequences(ids, np.array(start), np.array(list(map(len, ids))) - np.array(start))
        logps = reference_logps(self.annotator, sequences)  # type: ignore[arg-type]
        return np.array([sum(tokens) for tokens in logps.to_pylist()]).reshape(len(rows), -1)


@dataclass(frozen=True)
class _Sequences:
    """Prompts with responses, as far as the annotator reads them."""

    ids: list[list[int]]
    start: np.ndarray
    length: np.ndarray
    key: str = ""  # their keys are not kept

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def table(self) -> datasets.Dataset:
        """The column that keys are made of."""
        return datasets.Dataset.from_dict({"ids": self.ids})

    def tokens(self, index: int) -> tuple[list[int], int, str]:
        return self.ids[index], int(self.start[index]), ""


@dataclass(frozen=True)
class CachedReward:
    """A reward whose scores are cached, for a judge that asks for single texts."""

    annotator: Annotator
    reward: Reward
    scores_text = True

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The reward's own."""
        return self.reward.fingerprint

    def __call__(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[float]:
        """Return the raw rewards."""
        triples = list(zip(prompts, responses, answers, strict=True))
        return score(replace(self.annotator, reward=self.reward), triples, "Judging").tolist()


def match_answers(file: Rows, rows: Rows, seeds: int, name: str) -> Samples:
    """Return the file's answers to each row's prompt, one per seed. Raise one UserError for all missing answers.

    name: the value of answers=. Rows of sample.py say how many answers were sampled; those that it dropped as empty
    are restored as empty answers.
    """
    positions: dict[bytes, list[int]] = defaultdict(list)
    for i, key in enumerate(file.keys):
        positions[bytes(key)].append(i)
    problems, samples = Problems(f"answers={name} does not answer these prompts", shown=5), []
    for row, key in zip(rows, rows.keys, strict=True):
        answers = list[Sample]()
        for found in (file[i] for i in positions.get(bytes(key), ())):
            answers += [Sample(response.text, response.finished, response.ids) for response in found.responses]
            answers += [Sample("", True)] * (_count_sampled(found) - len(found.responses))
        if len(answers) != seeds:
            problems.add(f"row {row.id}", f"has {len(answers) or 'no'} answers, but seeds has {seeds} numbers")
        samples.append(answers)
    problems.check(
        "Set seeds to as many numbers as there are answers per prompt. The prompts are those of data=; to use the "
        f"file's own: data=files data.path={name} held_out=false."
    )
    if unused := len(file) - sum(len(positions[key]) for key in {bytes(key) for key in rows.keys}):
        say(f"{unused} of {len(file)} rows of {name} answer other prompts")
    return samples


def _count_sampled(row: Row) -> int:
    """Return how many responses sample.py drew for this row; 0 if the row is not from sample.py."""
    try:
        return int(json.loads(row.sampling or "")["sampling"]["responses"])
    except (ValueError, TypeError, LookupError):
        return 0
