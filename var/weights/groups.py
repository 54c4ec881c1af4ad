"""Sums and softmax over the responses to one prompt."""

import torch
from torch import Tensor

from var.weights.table import Table


def group_size(group: Tensor) -> Tensor:
    """[n] float64: how many sequences share the sequence's prompt."""
    return torch.bincount(group).double()[group]


def group_logsumexp(logits: Tensor, group: Tensor) -> Tensor:
    """[n] → [n]: log Σ exp over the sequences of the same prompt."""
    groups = int(group.max()) + 1
    peak = logits.new_full((groups,), -torch.inf).scatter_reduce(0, group, logits, "amax")
    total = logits.new_zeros(groups).index_add(0, group, (logits - peak[group]).exp())
    return (peak + total.log())[group]


def group_log_softmax(logits: Tensor, group: Tensor) -> Tensor:
    """[n] → [n]: log-softmax over the sequences of the same prompt."""
    return logits - group_logsumexp(logits, group)


def zero_variance(table: Table) -> Tensor:
    """[n] bool: the rewards of the sequence's prompt are all equal, so they say nothing about which answer is good."""
    return _all_equal(table.rewards, table.group)[table.group]


def _all_equal(rewards: Tensor, group: Tensor) -> Tensor:
    """[G] bool: of a prompt's rewards."""
    groups = int(group.max()) + 1
    high = rewards.new_full((groups,), -torch.inf).scatter_reduce(0, group, rewards, "amax")
    low = rewards.new_full((groups,), torch.inf).scatter_reduce(0, group, rewards, "amin")
    return high == low


def within_prompt_std(rewards: Tensor, group: Tensor) -> float | None:
    """σ: the pooled, unbiased standard deviation of the reward within a prompt; None where no prompt has two."""
    count = torch.bincount(group).double()
    mean = rewards.new_zeros(len(count)).index_add(0, group, rewards) / count.clamp(min=1)
    freedom = (count - 1).clamp(min=0).sum()
    if freedom == 0:
        return None
    deviation = (rewards - mean[group]).masked_fill(_all_equal(rewards, group)[group], 0.0)  # not their mean's rounding
    return float((deviation**2).sum().div(freedom).sqrt())
