"""SimPO: the policy's mean log-probability per token as reward, and a target margin (Meng et al., arXiv 2405.14734)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SimPO:
    """beta: β > 0, per token. gamma: γ ≥ 0 of the paper, a margin of β times mean log-probabilities; the authors'
    code is set by the ratio γ/β instead, mostly 0.3 to 0.6.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0 or not self.gamma >= 0:
            raise UserError("loss.beta is β > 0 and loss.gamma is γ ≥ 0")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        implicit = self.beta * batch.sum_by_sequence(logps) / batch.length
        losses = -logsigmoid(implicit[0::2] - implicit[1::2] - self.gamma)
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, implicit)
