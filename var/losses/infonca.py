"""InfoNCA: cross-entropy from the softmax of rewards to the softmax of implicit rewards, over a prompt's responses
(Chen et al., arXiv 2402.05369).

DPO is its limit for a pair whose rewards differ without bound. For responses drawn from π_ref, in groups of any size,
the optimum is π_ref exp(r/(αβ)) normalised; the loss sees implicit rewards up to a constant of the prompt only.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import group_metrics, log_ratios, reward_softmax
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError
from var.weights.groups import group_log_softmax


@dataclass(frozen=True, kw_only=True)
class InfoNCA:
    """beta: β > 0, implicit reward r_θ = β log π_θ/π_ref. temperature: α > 0, in units of reward; λ of RLHF is αβ."""

    beta: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.temperature > 0:
            raise UserError("loss.beta is β > 0 and loss.temperature is α > 0, in units of reward")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.GROUPS, Need.REWARDS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; a prompt's responses lie in one micro-batch. Mean over the step's groups."""
        implicit = self.beta * log_ratios(logps, batch)
        target = reward_softmax(batch, self.temperature).to(implicit)
        losses = -target * group_log_softmax(implicit, batch.group)
        return losses.sum() / batch.global_groups, group_metrics(logps, batch, implicit, target)
