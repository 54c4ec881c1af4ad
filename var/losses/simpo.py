"""SimPO: the mean log-probability per token as reward, and a target margin (Meng et al., arXiv 2405.14734)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """Reference-free preference optimization on pairs."""

    beta: float = 2.0
    """β > 0 per token."""
    gamma: float = 1.0
    """γ ≥ 0 of the paper, a margin of β times mean log-probabilities. The authors' code sets the ratio γ/β instead,
    mostly 0.3 to 0.6.
    """

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(),)

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.gamma >= 0:
            raise UserError("loss.beta must be above 0 and loss.gamma at least 0")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        implicit = self.beta * batch.sum_by_sequence(logps) / batch.length
        losses = -logsigmoid(implicit[0::2] - implicit[1::2] - self.gamma)
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, implicit)
