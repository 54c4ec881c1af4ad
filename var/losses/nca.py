"""NCA: InfoNCA's target, each implicit reward judged by a sigmoid of its own (Chen et al., arXiv 2402.05369).

Absolute where InfoNCA is relative, so that the better response's log-probability does not fall: for many responses a
prompt, drawn from π_ref, r_θ is drawn to r/α − log E[exp(r/α)]. At β = 1 that is π_θ = π_ref exp(r/α) normalised; at
another β no normalised policy reaches it, and where InfoNCA's optimum is π_ref exp(r/(αβ)), NCA's is only near it.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import group_metrics, log_ratios, reward_softmax
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError
from var.weights.groups import group_size


@dataclass(frozen=True, kw_only=True)
class NCA:
    """beta: β > 0, implicit reward r_θ = β log π_θ/π_ref. temperature: α > 0, in units of reward."""

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
        losses = -target * logsigmoid(implicit) - logsigmoid(-implicit) / group_size(batch.group).to(implicit)
        return losses.sum() / batch.global_groups, group_metrics(logps, batch, implicit, target)
