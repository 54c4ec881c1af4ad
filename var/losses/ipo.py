"""IPO (Azar et al., arXiv 2310.12036, Eq. 17): the log-ratio margin is regressed on 1/(2β)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class IPO:
    """Identity preference optimization on pairs."""

    beta: float = 0.1
    """τ of the paper, above 0."""
    reduction: Literal["sum", "mean"] = "sum"
    """Reduction of the log-ratio over tokens: `sum` (the paper) or `mean` (TRL)."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.reduction not in ("sum", "mean"):
            raise UserError("loss.beta must be above 0 and loss.reduction sum or mean")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        ratio = log_ratios(logps, batch)
        if self.reduction == "mean":
            ratio = ratio / batch.length
        losses = (ratio[0::2] - ratio[1::2] - 1 / (2 * self.beta)).square()
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
