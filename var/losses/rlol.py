"""R-LoL: reward times clipped ratio times NLL (Baheti et al., arXiv 2305.14718; their code)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Mean, Metrics
from var.losses.common import Ratio, check_ratio, importance_weighted_nll
from var.models.packing import Packed
from var.requirements import ReferenceLogps, Requirement, Rewards
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RLoL:
    """Reward times clipped ratio times NLL. Rewards must be ≥ 0; reward_scale=sigmoid makes them positive."""

    ratio: Ratio = "sequence"
    """ρ = π_θ/π_ref of the whole `sequence` or of each `token`."""
    clip: float | None = 0.9
    """ε > 0 holds ρ within 1 ± ε; None does not clip."""

    requires: ClassVar[tuple[Requirement, ...]] = (Rewards(nonnegative=True), ReferenceLogps())

    def __post_init__(self) -> None:
        if self.ratio == "none":
            raise UserError("loss.ratio must be sequence or token here. Without a ratio this is loss=wbc.")
        check_ratio(self.ratio, self.clip)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch, divided by the step's sequences, and its metrics."""
        assert batch.rewards is not None
        loss, metrics = importance_weighted_nll(logps, batch.rewards, batch, self.ratio, self.clip)
        return loss, {**metrics, "weight/mean": Mean(batch.rewards.detach().sum(), float(len(batch)))}
