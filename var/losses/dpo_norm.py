"""Length-normalised DPO: each log-ratio is per token of its response (Tülu 3, Lambert et al., arXiv 2411.15124)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DPONorm:
    """beta: β > 0, per token: larger than DPO's by the order of a response's length; 5 in Tülu 3."""

    beta: float = 5.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("loss.beta is β > 0")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        implicit = self.beta * log_ratios(logps, batch) / batch.length
        losses = -logsigmoid(implicit[0::2] - implicit[1::2])
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, implicit)
