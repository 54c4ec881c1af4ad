"""wBC, weighted behaviour cloning: a response's reward weighs its NLL (a baseline of Baheti et al., arXiv 2305.14718).

Over tables its minimiser is π_ref(y|x) R(x, y) normalised: linear in the reward where VAR is exponential.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import nonnegative_rewards, response_metrics, weighted_nll
from var.models.packing import Packed
from var.requirements import Need


@dataclass(frozen=True, kw_only=True)
class WBC:
    """No settings. Rewards must not be negative: reward_scale brings them there."""

    rewards_weigh = True  # see nonnegative_rewards; the data module refuses negative ones ahead

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        rewards = nonnegative_rewards(batch)
        loss, _ = weighted_nll(logps, rewards, batch, "sequence")
        return loss, {**response_metrics(logps, batch), "weight/mean": Mean(rewards.sum(), float(len(rewards)))}
