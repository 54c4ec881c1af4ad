"""APO, anchored preference optimization (D'Oosterlinck et al., arXiv 2408.06266, Eq. 7: zero, Eq. 8: down)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class APO:
    """Anchored preference optimization on pairs."""

    beta: float = 0.1
    """β > 0, the KL coefficient."""
    kind: Literal["zero", "down"] = "zero"
    """`zero` raises the better response and lowers the worse one, for data better than the model's own responses.
    `down` lowers both, the worse one more, for data that is worse than them.
    """

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.kind not in ("zero", "down"):
            raise UserError("loss.beta must be above 0 and loss.kind zero or down")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        implicit = self.beta * log_ratios(logps, batch)
        better, worse = implicit[0::2], implicit[1::2]
        if self.kind == "zero":
            losses = (-better).sigmoid() + worse.sigmoid()
        else:
            losses = better.sigmoid() + (worse - better).sigmoid()
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, implicit)
