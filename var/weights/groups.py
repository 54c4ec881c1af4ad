"""Sums, softmax and spread over the responses to one prompt. `group` [n] int, 0..G-1, is the prompt of a sequence.

Tables of groups have n entries, since G ≤ n: reading G from `group` would wait for a GPU.
"""

import torch
from torch import Tensor


def group_size(group: Tensor) -> Tensor:
    """Return [n] float64: the number of sequences with the sequence's prompt."""
    return group_sum(torch.ones_like(group, dtype=torch.float64), group)


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Return [n]: the sum of `values` [n] over the sequences with the sequence's prompt."""
    return values.new_zeros(len(values)).index_add(0, group, values)[group]


def group_logsumexp(logits: Tensor, group: Tensor) -> Tensor:
    """Return [n]: log Σ exp of `logits` [n] over the sequences with the sequence's prompt."""
    peak = logits.new_full((len(logits),), -torch.inf).scatter_reduce(0, group, logits, "amax")
    total = logits.new_zeros(len(logits)).index_add(0, group, (logits - peak[group]).exp())
    return (peak + total.clamp(min=1).log())[group]  # the largest adds e⁰; the log of an unused entry stays finite


def group_log_softmax(logits: Tensor, group: Tensor) -> Tensor:
    """Return [n]: log-softmax of `logits` [n] over the sequences with the sequence's prompt."""
    return logits - group_logsumexp(logits, group)


def zero_variance(rewards: Tensor, group: Tensor) -> Tensor:
    """Return [n] bool: whether all rewards [n] of the sequence's prompt are equal.

    Such a group does not say which response is better. A group of one response also has zero variance.
    """
    high = rewards.new_full((len(rewards),), -torch.inf).scatter_reduce(0, group, rewards, "amax")
    low = rewards.new_full((len(rewards),), torch.inf).scatter_reduce(0, group, rewards, "amin")
    return (high == low)[group]


def within_prompt_std(rewards: Tensor, group: Tensor) -> float | None:
    """Return σ, the pooled, unbiased standard deviation of the rewards [n] within a prompt.

    Return None if no prompt has two responses.
    """
    count = torch.bincount(group).double()
    mean = rewards.new_zeros(len(count)).index_add(0, group, rewards) / count.clamp(min=1)
    freedom = (count - 1).clamp(min=0).sum()
    if freedom == 0:
        return None
    deviation = (rewards - mean[group]).masked_fill(zero_variance(rewards, group), 0.0)  # not the rounding of the mean
    return float((deviation**2).sum().div(freedom).sqrt())
