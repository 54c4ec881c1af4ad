"""A loss of one's own: SLiC-HF without its SFT term (Zhao et al., arXiv 2305.10425, Eq. 2)."""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Metrics
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SLiC:
    """A hinge on the difference of summed log-probabilities. margin: δ > 0 nats; pairs further apart train no more."""

    margin: float = 1.0

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise UserError(f"loss.margin is δ > 0, got {self.margin}")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.PAIRS})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats; the batch's sequences alternate, better and worse. Mean over the whole step's pairs."""
        summed = batch.sum_by_sequence(logps)
        return (self.margin - summed[0::2] + summed[1::2]).relu().sum() / (batch.global_sequences / 2), {}
