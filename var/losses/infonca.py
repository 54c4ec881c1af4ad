"""InfoNCA: cross-entropy from the softmax of rewards to that of implicit rewards (Chen et al., arXiv 2402.05369).

Both are taken over a prompt's responses.

DPO is its limit for a pair whose rewards differ without bound. For responses drawn from π_ref, in groups of any size,
the optimum is π_ref exp(r/(αβ)), normalized. The loss depends on implicit rewards only up to a constant per prompt.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import group_metrics, log_ratios, reward_softmax
from var.models.packing import Packed
from var.requirements import Groups, ReferenceLogps, Requirement, Rewards
from var.utils.errors import UserError
from var.weights.groups import group_log_softmax


@dataclass(frozen=True, kw_only=True)
class InfoNCA:
    """Cross-entropy between reward and implicit reward within groups."""

    beta: float = 0.1
    """β > 0, of the implicit reward r_θ = β log π_θ/π_ref. λ of RLHF is αβ."""
    temperature: float = 1.0
    """α > 0, in units of the reward."""

    requires: ClassVar[tuple[Requirement, ...]] = (Groups(), Rewards(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.temperature > 0:
            raise UserError("loss.beta and loss.temperature must be above 0")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's groups, divided by the step's groups, and its metrics."""
        implicit = self.beta * log_ratios(logps, batch)
        target = reward_softmax(batch, self.temperature).to(implicit)
        losses = -target * group_log_softmax(implicit, batch.group)
        return losses.sum() / batch.global_groups, group_metrics(logps, batch, implicit, target)
