"""Sampled answers and what is measured of them: rewards, lengths and the KL divergence from the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var.data.chat import Chat
from var.data.rows import Rows
from var.models.packing import Packed, pack_tree
from var.rewards.base import Reward, compute_scores
from var.rewards.scale import Scale
from var.sampling.base import Samples
from var.utils.distributed import Ranks

ALONE = Ranks()


@dataclass(frozen=True)
class Answers:
    """K sampled answers to each of P prompts."""

    texts: list[list[str]]
    """Texts, K for each prompt."""
    ids: list[list[list[int]]]
    """Their tokens with the end token, as drawn."""
    finished: np.ndarray
    """[P, K] whether an answer ended before the token limit."""
    lengths: np.ndarray
    """[P, K] tokens, without the end token."""
    rewards: np.ndarray | None = None
    """[P, K] scaled rewards; None if the reward cannot score new text."""


def describe_answers(samples: Samples, chat: Chat) -> Answers:
    """Return the answers with their lengths, without rewards."""
    return Answers(
        texts=[[sample.text for sample in several] for several in samples],
        ids=(ids := [[sample.tokens(chat) for sample in several] for several in samples]),
        finished=np.array([[sample.finished for sample in several] for several in samples]),
        lengths=np.array([[len(one) - chat.is_finished(one) for one in several] for several in ids]),
    )


def score_answers(
    rows: Rows, samples: Samples, reward: Reward | None, scale: Scale, chat: Chat, ranks: Ranks = ALONE
) -> Answers:
    """Return the answers with their lengths and, if the reward can score text, their scaled rewards.

    `ranks` score the answers together, and each gets all rewards.
    """
    answers = describe_answers(samples, chat)
    if reward is None or not reward.scores_text:
        return answers
    own = ranks.deal(len(rows))
    triples = [(rows[i].prompt, sample.text, rows[i].answer) for i in own for sample in samples[i]]
    scores = compute_scores(reward, *map(list, zip(*triples, strict=True))) if triples else np.zeros(0)
    rewards = ranks.collect(np.split(scores, len(own)) if own else [])
    return replace(answers, rewards=scale(np.stack(rewards)))


def win_rate(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the fraction [P] of pairs (k, k') in which the reward prefers the answer `after`, from [P, K] rewards.

    A tie counts half.
    """
    gain = after[:, :, None] - before[:, None, :]
    return ((gain > 0) + 0.5 * (gain == 0)).mean(axis=(1, 2))


def pack_answers(chat: Chat, rows: Rows, samples: Samples) -> list[Packed]:
    """Return a batch per prompt: the prompt once, and its K answers. An empty answer consists of its end token."""
    return [
        pack_tree([chat.prompt(row.prompt)], [[sample.tokens(chat) for sample in several]])
        for row, several in zip(rows, samples, strict=True)
    ]


@torch.no_grad()
def compute_logps(
    policy: Callable[[Packed], Tensor],
    batches: Sequence[Packed],
    device: torch.device | str,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Return the log-probabilities of each batch's response tokens, [N] nats on the CPU."""
    logps = []
    for batch in batches:
        logps.append(policy(batch.to(device)).cpu())
        advance(1)
    return logps


def divergence(batches: Sequence[Packed], ours: Sequence[Tensor], reference: Sequence[Tensor]) -> list[np.ndarray]:
    """Return log π_θ(y|x) − log π_ref(y|x) [K] in nats for each prompt's answers, sampled from π_θ.

    Its mean estimates KL(π_θ ‖ π_ref).

    Args:
        batches: the answers, by `pack_answers`.
        ours: log π_θ of their tokens, by `compute_logps`.
        reference: log π_ref of their tokens.
    """
    return [
        batch.sum_by_sequence(own - other).float().numpy()
        for batch, own, other in zip(batches, ours, reference, strict=True)
    ]


def samples(rows: Rows, before: Answers | None, after: Answers) -> Sequence[dict[str, Any]]:
    """Return one JSON record per prompt: the answers before and after training with their rewards."""
    records = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"id": row.id, "prompt": list(row.prompt), "answer": row.answer}
        for name, answers in (("before", before), ("after", after)):
            if answers is not None:
                rewards = None if answers.rewards is None else answers.rewards[i].tolist()
                lengths = answers.lengths[i].tolist()
                record[name] = {
                    "texts": answers.texts[i], "ids": answers.ids[i], "rewards": rewards, "lengths": lengths,
                }  # fmt: skip
        records.append(record)
    return records
