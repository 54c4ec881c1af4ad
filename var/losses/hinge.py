"""The hinge on the margin of log-ratios: SLiC-HF's (Zhao et al., arXiv 2305.10425) as RSO normalises it by the
reference (Liu et al., arXiv 2309.06657).

SLiC-HF itself has no reference in the hinge, max(0, δ − log π_θ(y_w|x) + log π_θ(y_l|x)), and adds an NLL on an SFT
target; here δ = 1/β and no NLL, as in RSO.
"""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import log_ratios, pair_metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """beta: γ of RSO, > 0. A pair whose log-ratio margin is above 1/β trains no more."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError("loss.beta is > 0")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS, Need.REFERENCE_LOGPS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the step's pairs."""
        ratio = log_ratios(logps, batch)
        losses = (1 - self.beta * (ratio[0::2] - ratio[1::2])).relu()
        return losses.sum() / (batch.global_sequences / 2), pair_metrics(logps, batch, self.beta * ratio)
