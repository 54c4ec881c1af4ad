"""The hinge on the margin of log-ratios: SLiC-HF's, as RSO normalizes it by the reference.

SLiC-HF is by Zhao et al., arXiv 2305.10425, and RSO by Liu et al., arXiv 2309.06657.

SLiC-HF has no reference in the hinge, max(0, δ − log π_θ(y_w|x) + log π_θ(y_l|x)), and adds an NLL on an SFT target.
Here δ = 1/β and there is no NLL, as in RSO.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Pairs, ReferenceLogps, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """Hinge loss on pairs. A pair whose log-ratio margin exceeds 1/β no longer trains."""

    beta: float = 0.1
    """γ of RSO, above 0."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(), ReferenceLogps())

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("loss.beta must be above 0")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the sum over this micro-batch's pairs, divided by the step's pairs, and its metrics."""
        ratio = log_ratios(logps, batch)
        losses = (1 - self.beta * (ratio[0::2] - ratio[1::2])).relu()
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
