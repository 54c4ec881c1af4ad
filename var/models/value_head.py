"""A policy with a value head, for PPO."""

from typing import Any

import torch
from torch import Tensor, nn

from var.models.packing import Packed
from var.models.policy import Policy


class ActorCritic(nn.Module):
    """A policy and a value head on its hidden states, for PPO: forward(batch) is both, one value a response token."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.head = nn.Linear(policy.model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def model(self) -> Any:
        return self.policy.model

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Returns [N] nats and [N] reward units, the value of the state before each response token."""
        hidden = self.policy.predicting(batch)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.head(hidden.to(self.head.weight.dtype))[:, 0]
        return self.policy.logps(hidden, batch), values


def unwrap_value_head(policy: Policy | ActorCritic) -> Policy:
    """What gives the log-probabilities alone."""
    return policy.policy if isinstance(policy, ActorCritic) else policy
