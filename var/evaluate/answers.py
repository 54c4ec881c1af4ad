"""Validation by generation: reward, length and KL of a policy's own answers on prompts that training never saw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from var.data.chat import Chat
from var.data.rows import Rows
from var.models.packing import pack_tree
from var.models.policy import Policy
from var.rewards.base import Reward, compute_scores
from var.rewards.scale import Scale


@dataclass(frozen=True)
class Answers:
    """K sampled answers of each of P prompts. rewards: [P, K] on the scale that `rewarded` was given, absent where the
    reward cannot score new text."""

    texts: list[list[str]]
    finished: np.ndarray
    lengths: np.ndarray
    rewards: np.ndarray | None


def score_answers(
    rows: Rows, texts: list[list[tuple[str, bool]]], reward: Reward | None, scale: Scale, chat: Chat
) -> Answers:
    """Rewards and lengths (in tokens, the end token not counted) of sampled answers."""
    prompts, flat, answers = [], [], []
    for row, several in zip(rows, texts, strict=True):
        for text, _ in several:
            prompts.append(row.prompt)
            flat.append(text)
            answers.append(row.answer)
    shape = (len(texts), len(texts[0]))
    lengths = np.array([len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in flat])
    rewards = None
    if reward is not None and reward.scores_text:
        rewards = scale(compute_scores(reward, prompts, flat, answers)).reshape(shape)
    return Answers(
        texts=[[text for text, _ in several] for several in texts],
        finished=np.array([[done for _, done in several] for several in texts]),
        lengths=lengths.reshape(shape),
        rewards=rewards,
    )


def win_rate(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[P] share of a prompt's pairs (k, k') in which the reward prefers the answer after, ties half; both [P, K]."""
    ahead = after[:, :, None] - before[:, None, :]
    return ((ahead > 0) + 0.5 * (ahead == 0)).mean(axis=(1, 2))


@torch.inference_mode()
def divergence(
    policy: Policy,
    reference: Policy,
    chat: Chat,
    rows: Rows,
    texts: list[list[tuple[str, bool]]],
    advance: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """[P, K] nats: log π_θ(y|x) − log π_ref(y|x) of the policy's own answers; its mean estimates KL(π_θ ‖ π_ref).

    Each prompt is encoded once for its K answers. An empty answer is its end token alone.
    """
    out = []
    for row, several in zip(rows, texts, strict=True):
        prompt = chat.prompt(row.prompt)
        batch = pack_tree([prompt], [[response_tokens(chat, text, done) for text, done in several]])
        batch = batch.to(next(policy.parameters()).device)
        out.append(batch.sum_by_sequence(policy(batch) - reference(batch)).float().cpu().numpy())
        advance(1)
    return np.stack(out)


def response_tokens(chat: Chat, text: str, finished: bool) -> list[int]:
    """An answer's tokens and, where it is finished, the end token; an empty one is its end token alone."""
    ids = list(chat.tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*ids, chat.end_token] if finished or not ids else ids


def samples(rows: Rows, before: Answers | None, after: Answers) -> Sequence[dict[str, Any]]:
    """One record a prompt: the answers before and after, side by side, with their rewards."""
    records = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"id": row.id, "prompt": list(row.prompt), "answer": row.answer}
        for name, answers in (("before", before), ("after", after)):
            if answers is not None:
                rewards = None if answers.rewards is None else answers.rewards[i].tolist()
                record[name] = {"texts": answers.texts[i], "rewards": rewards, "lengths": answers.lengths[i].tolist()}
        records.append(record)
    return records
