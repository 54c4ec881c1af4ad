"""Robust DPO (Chowdhury et al., arXiv 2403.00409): DPO's loss, made unbiased for labels flipped at a known rate."""

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
class Robust:
    """DPO for labels that are flipped at a known rate.

    The expectation over flips is DPO's loss on the true labels; conservative DPO (loss=dpo) is biased towards ties. In
    return there is no minimum: the slope in the margin h tends to −β ε / (1 − 2ε), not to 0.
    """

    beta: float = 0.1
    """β > 0, the KL coefficient."""
    label_smoothing: float = 0.1
    """ε, the rate at which labels are flipped, in (0, 1/2)."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 < self.label_smoothing < 0.5:
            raise UserError("loss.beta must be above 0 and loss.label_smoothing in (0, 0.5). For 0 use loss=dpo.")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        ratio = log_ratios(logps, batch)
        margin = self.beta * (ratio[0::2] - ratio[1::2])
        flipped = self.label_smoothing
        losses = (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
