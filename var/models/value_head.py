"""A policy with a value head, for PPO and DRO."""

from typing import Any

import torch
from torch import Tensor, nn

from var.models.packing import Packed
from var.models.policy import Policy


class ActorCritic(nn.Module):
    """Compute log-probabilities and values: a policy and a linear value head, initially zero, on its hidden states."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.head = nn.Linear(policy.model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def model(self) -> Any:
        """The policy's transformers model."""
        return self.policy.model

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return [N] nats, and [N] values in reward units of the state before each response token."""
        hidden = self.policy.predictor_states(batch)
        precise = torch.promote_types(hidden.dtype, torch.float32)  # also of a head that FSDP gathers in bfloat16
        with torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.head.weight.to(precise), self.head.bias.to(precise)
            values = torch.nn.functional.linear(hidden.to(precise), weight, bias)[:, 0]
        return self.policy.logps(hidden, batch), values


def unwrap_value_head(policy: Policy | ActorCritic) -> Policy:
    """Return the policy without its value head, if it has one."""
    return policy.policy if isinstance(policy, ActorCritic) else policy
