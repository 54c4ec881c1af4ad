"""IPO (Azar et al., arXiv 2310.12036, Eq. 17): the log-ratio margin is regressed on 1/(2β)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class IPO:
    """beta: τ of the paper, > 0. reduction: `sum` of the log-ratio over tokens is the paper's; `mean` is TRL's."""

    beta: float = 0.1
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.reduction not in ("sum", "mean"):
            raise UserError("loss.beta is > 0 and loss.reduction is sum or mean")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        ratio = log_ratios(logps, batch)
        if self.reduction == "mean":
            ratio = ratio / batch.length
        losses = (ratio[0::2] - ratio[1::2] - 1 / (2 * self.beta)).square()
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
