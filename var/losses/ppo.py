"""PPO (Schulman et al., arXiv 1707.06347, Eq. 7, 9, 11) as RLHF uses it (Stiennon et al., arXiv 2009.01325).

The KL penalty is a reward of each token, the reward is added at the last token, and a value head is trained alongside
the policy. Unlike the usual implementations, advantages are not whitened: their mean and spread over a micro-batch
would make a sequence's loss depend on its neighbors, and micro-batches and ranks would no longer add up. The learning
rate absorbs the scale of the reward. β is fixed and there is no entropy bonus. A truncated response counts as finished.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import clipped_surrogate, rollout_metrics
from var.models.packing import Packed
from var.requirements import OldLogps, ReferenceLogps, Requirement, Rewards, Rollout, TokenValues
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Clipped policy gradient with a value head."""

    beta: float = 0.05
    """β ≥ 0, the KL coefficient; 0 needs no reference."""
    gamma: float = 1.0
    """Discount per token, in (0, 1]."""
    lam: float = 0.95
    """λ of GAE, in [0, 1]: 0 trusts the value head, 1 the return."""
    clip: float = 0.2
    """ε of the ratio, in (0, 1]. If each rollout is one step, the ratio is 1."""
    clip_value: float = 0.2
    """How far a value moves from the one predicted at sampling, above 0, in units of the reward; .inf for no bound."""
    value_weight: float = 0.1
    """The weight of half the squared error of the value, above 0."""
    rollout: Rollout = field(default_factory=Rollout)
    """How often the policy is sampled."""

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.clip <= 1:
            raise UserError("loss.beta must be at least 0 and loss.clip in (0, 1]")
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise UserError("loss.gamma must be in (0, 1] and loss.lam in [0, 1]")
        if not self.clip_value > 0 or not self.value_weight > 0:
            raise UserError(
                "loss.clip_value and loss.value_weight must be above 0. For no bound use loss.clip_value=.inf."
            )

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Rollouts with rewards, values and the sampling policy's numbers, and the reference for the KL penalty."""
        reference = (ReferenceLogps(),) if self.beta else ()
        return (self.rollout, Rewards(), OldLogps(rollout=self.rollout), TokenValues(), *reference)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the policy's loss plus the weighted value loss, over the step's tokens, and its metrics.

        `batch.values` hold a gradient, as `logps` do.
        """
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
    """Return [N] Â_t = Σ_l (γλ)^l δ_{t+l} within a response, δ_t = r_t + γ V_{t+1} − V_t (Eq. 11, 12).

    V after a response's end is 0.

    Args:
        rewards: [N] in units of the reward, without a gradient.
        values: [N], the value before each token.
        sequence: [N] int, the sequence of each token.
        gamma: the discount per token.
        lam: λ of GAE.
    """
    advantages = rewards + gamma * _shift(values, sequence, 1) - values
    reach = 1  # tokens that each sum spans. It doubles, so a response of T tokens takes log2 T passes.
    while reach < len(sequence):
        advantages = advantages + (gamma * lam) ** reach * _shift(advantages, sequence, reach)
        reach *= 2
    return advantages


def _shift(values: Tensor, sequence: Tensor, by: int) -> Tensor:
    """Return [N]: the value `by` tokens later in the same sequence, and 0 past its end."""
    later = torch.zeros_like(values)
    later[:-by] = torch.where(sequence[by:] == sequence[:-by], values[by:], 0.0)
    return later
