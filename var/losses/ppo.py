"""PPO (Schulman et al., arXiv 1707.06347, Eq. 7, 9, 11) as RLHF has it (Stiennon et al., arXiv 2009.01325): the KL
penalty is a reward of each token, the reward comes with the last one, and a value head is trained beside the policy.

Where we leave the usual implementations: advantages are not whitened. Their mean and spread over a micro-batch would
make a sequence's loss depend on its neighbours, and micro-batches and ranks would no longer add up; the scale of the
reward is the learning rate's business. β is fixed, there is no entropy bonus, and an answer that was cut is at its end.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import clipped_surrogate, rollout_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.training.rollout import Rollout
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PPO:
    """beta: β ≥ 0, the KL coefficient; 0 needs no reference. gamma: discount of a token, in (0, 1]. lam: λ of GAE, in
    [0, 1]; 0 trusts the value head, 1 the return. clip: ε of the ratio, in (0, 1]. clip_value: > 0, in reward units,
    how far a value moves from the one predicted when sampling; .inf leaves it free. value_weight: > 0, of half the
    squared error. rollout: how often the policy is sampled; where each rollout gives one step, the ratio is 1.
    """

    beta: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    clip_value: float = 0.2
    value_weight: float = 0.1
    rollout: Rollout = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.clip <= 1:
            raise UserError("loss.beta is β ≥ 0 and loss.clip lies in (0, 1]")
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise UserError("loss.gamma lies in (0, 1] and loss.lam in [0, 1]")
        if not self.clip_value > 0 or not self.value_weight > 0:
            raise UserError("loss.clip_value and loss.value_weight are > 0; loss.clip_value=.inf clips no value")

    @property
    def needs(self) -> frozenset[Need]:
        reference = {Need.REFERENCE_LOGPS} if self.beta else set()
        return frozenset({Need.ROLLOUT, Need.REWARDS, Need.OLD_LOGPS, Need.VALUES} | reference)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token; batch.values hold a gradient too. Mean over the step's
        response tokens of the policy's and, weighted, the value head's loss."""
        assert batch.rewards is not None
        assert batch.old_logps is not None
        assert batch.values is not None
        assert batch.old_values is not None
        old, values = batch.old_logps.to(logps.dtype), batch.old_values.to(logps.dtype)
        rewards = torch.zeros_like(old)
        if self.beta:
            assert batch.reference_logps is not None
            rewards = -self.beta * (old - batch.reference_logps.to(logps.dtype))
        rewards = rewards.index_add(0, batch.length.cumsum(0) - 1, batch.rewards.to(logps.dtype))
        advantages = gae(rewards, values, batch.sequence, self.gamma, self.lam)
        losses, metrics = clipped_surrogate(logps - old, advantages, self.clip, self.clip)
        error = batch.values.to(logps.dtype) - (returns := advantages + values)
        bounded = values + (batch.values - values).clamp(-self.clip_value, self.clip_value) - returns
        value_losses = torch.maximum(error.square(), bounded.square()) / 2
        metrics["value/loss"] = Mean(value_losses.detach().sum(), float(len(logps)))
        metrics["return/mean"] = Mean(returns.sum(), float(len(logps)))
        loss = (losses.sum() + self.value_weight * value_losses.sum()) / batch.global_tokens
        return loss, {**rollout_metrics(logps, batch), **metrics}


def gae(rewards: Tensor, values: Tensor, sequence: Tensor, gamma: float, lam: float) -> Tensor:
    """Â_t = Σ_l (γλ)^l δ_{t+l} within a response, δ_t = r_t + γ V_{t+1} − V_t (Eq. 11, 12), V after its end 0.

    rewards, values: [N] reward units, no gradient; values[t] comes before the token. sequence: [N]. Returns [N].
    """
    advantages = rewards + gamma * _ahead(values, sequence, 1) - values
    reach = 1  # tokens that each sum spans; doubled, so that a response of T tokens takes log2 T passes and not T
    while reach < len(sequence):
        advantages = advantages + (gamma * lam) ** reach * _ahead(advantages, sequence, reach)
        reach *= 2
    return advantages


def _ahead(values: Tensor, sequence: Tensor, by: int) -> Tensor:
    """[N] → [N]: each token's value `by` tokens later, 0 past the end of its sequence."""
    ahead = torch.zeros_like(values)
    ahead[:-by] = torch.where(sequence[by:] == sequence[:-by], values[by:], 0.0)
    return ahead
