"""The inputs of the weight estimators."""

from dataclasses import dataclass

import torch
from torch import Tensor

from var.models.packing import Packed


@dataclass(frozen=True, kw_only=True)
class Table:
    """The numbers of n sequences. A field is absent where no one asked for it.

    rewards [n], in reward units, scaled as the run says. group [n] int, 0..G-1: the prompt. length [n]: response
    tokens. reference_logps [n] nats, summed over response tokens. features [G, F]: of each group's prompt.
    micro [M, B] int: the plan's sequences, -1 where the last micro-batch is short. cross_rewards, cross_logps
    [M, B, B]: row i a prompt, column j a response of the micro-batch; reward units, and nats summed over tokens.
    candidates [G, K]: rewards of K responses that the reference gave to each group's prompt.
    """

    rewards: Tensor
    group: Tensor
    length: Tensor
    reference_logps: Tensor | None = None
    features: Tensor | None = None
    micro: Tensor | None = None
    cross_rewards: Tensor | None = None
    cross_logps: Tensor | None = None
    candidates: Tensor | None = None


def micro_batch_inputs(batch: Packed) -> Table:
    """One micro-batch as a Table: for weights from a live reference."""
    assert batch.rewards is not None
    own = None if batch.reference_logps is None else batch.sum_by_sequence(batch.reference_logps.double())
    return Table(
        rewards=batch.rewards.double(),
        group=batch.group,
        length=batch.length,
        reference_logps=own,
        micro=torch.arange(len(batch), device=batch.length.device)[None],
        cross_rewards=None if batch.cross_rewards is None else batch.cross_rewards.double()[None],
        cross_logps=None if batch.cross_logps is None else batch.cross_logps.double()[None],
    )
