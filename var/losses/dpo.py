"""DPO (Rafailov et al., arXiv 2305.18290, Eq. 7), with conservative labels (Mitchell, 2023: cDPO)."""

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
class DPO:
    """Direct preference optimization on pairs."""

    beta: float = 0.1
    """β > 0, the KL coefficient."""
    label_smoothing: float = 0.0
    """The fraction of pairs assumed to be labeled wrongly, in [0, 1/2)."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise UserError("loss.beta must be above 0 and loss.label_smoothing in [0, 0.5)")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        ratio = log_ratios(logps, batch)
        margin = self.beta * (ratio[0::2] - ratio[1::2])
        smooth = self.label_smoothing
        losses = -(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
