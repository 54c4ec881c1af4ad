"""R-LoL, reward times clipped ratio times NLL (Baheti et al., arXiv 2305.14718; their code). The base of A-LoL."""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import (
    Ratio,
    check_ratio,
    importance_weighted_nll,
    nonnegative_rewards,
)
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RLoL:
    """ratio: ρ = π_θ/π_ref of a whole sequence, or of each token. clip: ε > 0, ρ within 1 ± ε; None: as it is.

    Rewards must not be negative: reward_scale brings them there.
    """

    ratio: Ratio = "sequence"
    clip: float | None = 0.9

    def __post_init__(self) -> None:
        if self.ratio == "none":
            raise UserError("loss.ratio is sequence or token here; without a ratio this is loss=wbc")
        check_ratio(self.ratio, self.clip)

    rewards_weigh = True  # see nonnegative_rewards; the data module refuses negative ones ahead

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REWARDS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Mean over the step's sequences."""
        rewards = nonnegative_rewards(batch)
        loss, metrics = importance_weighted_nll(logps, rewards, batch, self.ratio, self.clip)
        return loss, {**metrics, "weight/mean": Mean(rewards.sum(), float(len(rewards)))}
