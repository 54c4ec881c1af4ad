"""RLOO (Ahmadian et al., arXiv 2402.14740): REINFORCE whose baseline is the mean of the group's other responses.

The paper's gradient is that of a policy that samples for each step. If a rollout serves several steps, the ratio of the
whole sequence enters, clipped, as in TRL.
"""

from dataclasses import dataclass, field

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import clipped_surrogate, rollout_metrics, zero_variance_metrics
from var.models.packing import Packed
from var.requirements import OldLogps, ReferenceLogps, Requirement, Rewards, Rollout
from var.utils.errors import UserError
from var.weights.groups import group_size, group_sum


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """Policy gradient with a leave-one-out baseline."""

    beta: float = 0.05
    """β ≥ 0, the KL coefficient, part of the reward; 0 needs no reference."""
    clip: float = 0.2
    """ε of the sequence's ratio, in (0, 1]. If each rollout is one step, the ratio is 1."""
    rollout: Rollout = field(default_factory=Rollout)
    """How often the policy is sampled."""

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.clip <= 1:
            raise UserError("loss.beta must be at least 0 and loss.clip in (0, 1]")

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """Rollouts with rewards and the sampling policy's numbers, and the reference for the KL penalty."""
        reference = (ReferenceLogps(),) if self.beta else ()
        return (self.rollout, Rewards(), OldLogps(rollout=self.rollout), *reference)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch, divided by the step's sequences, and its metrics."""
        assert batch.rewards is not None
        assert batch.old_logps is not None
        groups = zero_variance_metrics(batch)
        rewards, old = batch.rewards.double(), batch.old_logps.double()
        if self.beta:
            assert batch.reference_logps is not None
            rewards = rewards - self.beta * batch.sum_by_sequence(old - batch.reference_logps.double())
        others = (group_sum(rewards, batch.group) - rewards) / (group_size(batch.group) - 1)
        log_ratio = batch.sum_by_sequence(logps - old.to(logps.dtype))
        losses, ratios = clipped_surrogate(log_ratio, (rewards - others).to(logps.dtype), self.clip, self.clip)
        return losses.sum() / batch.global_sequences, {**rollout_metrics(logps, batch), **groups, **ratios}
