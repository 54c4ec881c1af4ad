"""NCA: InfoNCA's target, with a sigmoid for each implicit reward (Chen et al., arXiv 2402.05369).

It is absolute where InfoNCA is relative, so the better response's log-probability does not fall. For responses drawn
from π_ref and K → ∞, r_θ tends to r/α − log E[exp(r/α)]. At β = 1 that is π_θ = π_ref exp(r/α), normalized. At another
β no normalized policy reaches it, and NCA's optimum is only near InfoNCA's, π_ref exp(r/(αβ)).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import group_metrics, log_ratios, reward_softmax
from var.models.packing import Packed
from var.requirements import Groups, ReferenceLogps, Requirement, Rewards
from var.utils.errors import UserError
from var.weights.groups import group_size


@dataclass(frozen=True, kw_only=True)
class NCA:
    """Noise-contrastive alignment within groups."""

    beta: float = 0.1
    """β > 0, of the implicit reward r_θ = β log π_θ/π_ref."""
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
        losses = -target * logsigmoid(implicit) - logsigmoid(-implicit) / group_size(batch.group).to(implicit)
        return losses.sum() / batch.global_groups, group_metrics(logps, batch, implicit, target)
