"""R-GOLD: GOLD (Pang and He, arXiv 2009.08593) with the reward as weight, as in Baheti et al., arXiv 2305.14718.

R Σ_t max(π_θ(y_t), floor) · −log π_θ(y_t), with the first factor detached: tokens that the policy already finds likely
count most.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import response_metrics
from var.models.packing import Packed
from var.requirements import Requirement, Rewards
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RGOLD:
    """Reward times token probability times NLL. Rewards must be ≥ 0; reward_scale=sigmoid makes them positive."""

    floor: float = 0.1
    """The least weight of a token, in [0, 1)."""

    requires: ClassVar[tuple[Requirement, ...]] = (Rewards(nonnegative=True),)

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise UserError(f"loss.floor must be in [0, 1), got {self.floor}. For weight 1 per token use loss=wbc.")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch, divided by the step's sequences, and its metrics."""
        assert batch.rewards is not None
        rewards = batch.rewards.detach()
        belief = logps.detach().exp().clamp(min=self.floor)
        weights = rewards.to(logps.dtype)[batch.sequence] * belief
        metrics = {**response_metrics(logps, batch), "weight/mean": Mean(rewards.sum(), float(len(rewards)))}
        return -(weights * logps).sum() / batch.global_sequences, metrics
