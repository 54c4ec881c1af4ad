"""APO, anchored preference optimisation (D'Oosterlinck et al., arXiv 2408.06266, Eq. 7: zero, Eq. 8: down)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class APO:
    """beta: β > 0. kind: `zero` raises the better response and lowers the worse one, for answers above the model's
    own; `down` lowers both, the worse one more, for answers below them.
    """

    beta: float = 0.1
    kind: Literal["zero", "down"] = "zero"

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.kind not in ("zero", "down"):
            raise UserError("loss.beta is β > 0 and loss.kind is zero or down")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        implicit = self.beta * log_ratios(logps, batch)
        better, worse = implicit[0::2], implicit[1::2]
        if self.kind == "zero":
            losses = (-better).sigmoid() + worse.sigmoid()
        else:
            losses = better.sigmoid() + (worse - better).sigmoid()
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, implicit)
