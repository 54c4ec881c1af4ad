"""RLOO (Ahmadian et al., arXiv 2402.14740): REINFORCE whose baseline is the mean of the group's others.

The paper's gradient is that of a policy that samples anew for each step. Where a rollout serves more than one, the
ratio of the whole sequence enters, clipped, as in TRL.
"""

from dataclasses import dataclass, field

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import clipped_surrogate, group_sum, rollout_metrics, zero_variance_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.training.rollout import Rollout
from var.utils.errors import UserError
from var.weights.groups import group_size


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """beta: β ≥ 0, the KL coefficient, part of the reward; 0 needs no reference. clip: ε of the sequence's ratio, in
    (0, 1]. rollout: how often the policy is sampled; where each rollout gives one step, the ratio is 1, never clipped.
    """

    beta: float = 0.05
    clip: float = 0.2
    rollout: Rollout = field(default_factory=Rollout)

    def __post_init__(self) -> None:
        if not self.beta >= 0 or not 0 < self.clip <= 1:
            raise UserError("loss.beta is β ≥ 0 and loss.clip lies in (0, 1]")

    @property
    def needs(self) -> frozenset[Need]:
        reference = {Need.REFERENCE_LOGPS} if self.beta else set()
        return frozenset({Need.ROLLOUT, Need.REWARDS, Need.OLD_LOGPS} | reference)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
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
