"""Length-normalized DPO: each log-ratio is a mean over tokens (Tülu 3, Lambert et al., arXiv 2411.15124)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DPONorm:
    """DPO on log-ratios per token."""

    beta: float = 5.0
    """β > 0 per token. It is larger than DPO's by about a response's length: 5 in Tülu 3."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("loss.beta must be above 0")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        implicit = self.beta * log_ratios(logps, batch) / batch.length
        losses = -logsigmoid(implicit[0::2] - implicit[1::2])
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, implicit)
