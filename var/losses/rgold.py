"""R-GOLD: GOLD (Pang and He, arXiv 2009.08593) with the reward for its weight, as in Baheti et al., arXiv 2305.14718.

R Σ_t max(π_θ(y_t), floor) · −log π_θ(y_t), the first factor detached: tokens the policy already believes in weigh most.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import nonnegative_rewards, response_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RGOLD:
    """floor: the least weight of a token, in [0, 1). Rewards must not be negative: reward_scale brings them there."""

    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise UserError(f"loss.floor lies in [0, 1), got {self.floor}; every token weighing 1 is loss=wbc")

    rewards_weigh = True  # see nonnegative_rewards; the data module refuses negative ones ahead

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        rewards = nonnegative_rewards(batch)
        belief = logps.detach().exp().clamp(min=self.floor)
        weights = rewards.to(logps.dtype)[batch.sequence] * belief
        metrics = {**response_metrics(logps, batch), "weight/mean": Mean(rewards.sum(), float(len(rewards)))}
        return -(weights * logps).sum() / batch.global_sequences, metrics
