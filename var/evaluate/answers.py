"""Sampled answers and what is measured of them: rewards, lengths and the KL divergence from the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from var.data.chat import Chat
from var.data.rows import Rows
from var.models.packing import pack_tree
from var.models.policy import Policy
from var.rewards.base import Reward, compute_scores
from var.rewards.scale import Scale
from var.sampling.base import Texts


@dataclass(frozen=True)
class Answers:
    """K sampled answers to each of P prompts."""

    texts: list[list[str]]
    """Texts, K for each prompt."""
    finished: np.ndarray
    """[P, K] whether an answer ended before the token limit."""
    lengths: np.ndarray
    """[P, K] tokens, without the end token."""
    rewards: np.ndarray | None = None
    """[P, K] scaled rewards; None if the reward cannot score new text."""


def describe_answers(texts: Texts, chat: Chat) -> Answers:
    """Return the answers with their lengths, without rewards."""
    return Answers(
        texts=[[text for text, _ in answers] for answers in texts],
        finished=np.array([[finished for _, finished in answers] for answers in texts]),
        lengths=np.array([[len(tokenize_response(chat, text, True)) - 1 for text, _ in answers] for answers in texts]),
    )


def score_answers(rows: Rows, texts: Texts, reward: Reward | None, scale: Scale, chat: Chat) -> Answers:
    """Return the answers with their lengths and, if the reward can score text, their scaled rewards."""
    answers = describe_answers(texts, chat)
    if reward is None or not reward.scores_text:
        return answers
    triples = [(row.prompt, text, row.answer) for row, several in zip(rows, texts, strict=True) for text, _ in several]
    rewards = compute_scores(reward, *map(list, zip(*triples, strict=True)))
    return replace(answers, rewards=scale(rewards).reshape(answers.lengths.shape))


def win_rate(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the fraction [P] of pairs (k, k') in which the reward prefers the answer `after`, from [P, K] rewards.

    A tie counts half.
    """
    gain = after[:, :, None] - before[:, None, :]
    return ((gain > 0) + 0.5 * (gain == 0)).mean(axis=(1, 2))


@torch.inference_mode()
def divergence(
    policy: Policy,
    reference: Policy,
    chat: Chat,
    rows: Rows,
    texts: Texts,
    advance: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return log π_θ(y|x) − log π_ref(y|x) [P, K] in nats for the policy's own answers.

    Its mean estimates KL(π_θ ‖ π_ref). Each prompt is encoded once for its K answers. An empty answer consists of its
    end token.
    """
    divergences = []
    for row, answers in zip(rows, texts, strict=True):
        responses = [tokenize_response(chat, text, finished) for text, finished in answers]
        batch = pack_tree([chat.prompt(row.prompt)], [responses]).to(next(policy.parameters()).device)
        divergences.append(batch.sum_by_sequence(policy(batch) - reference(batch)).float().cpu().numpy())
        advance(1)
    return np.stack(divergences)


def tokenize_response(chat: Chat, text: str, finished: bool) -> list[int]:
    """Return an answer's tokens, with the end token if it is finished; an empty answer is its end token."""
    ids = list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*ids, chat.end_token] if finished or not ids else ids


def samples(rows: Rows, before: Answers | None, after: Answers) -> Sequence[dict[str, Any]]:
    """Return one JSON record per prompt: the answers before and after training with their rewards."""
    records = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"id": row.id, "prompt": list(row.prompt), "answer": row.answer}
        for name, answers in (("before", before), ("after", after)):
            if answers is not None:
                rewards = None if answers.rewards is None else answers.rewards[i].tolist()
                record[name] = {"texts": answers.texts[i], "rewards": rewards, "lengths": answers.lengths[i].tolist()}
        records.append(record)
    return records
