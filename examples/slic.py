"""A custom loss: SLiC-HF without its SFT term (Zhao et al., arXiv 2305.10425, Eq. 2)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.models.packing import Packed
from var.requirements import Pairs, Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SLiC:
    """A hinge on the difference of summed log-probabilities."""

    margin: float = 1.0
    """δ > 0, in nats. Pairs whose log-probabilities differ by more have no gradient."""

    requires: ClassVar[tuple[Requirement, ...]] = (Pairs(),)

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise UserError(f"loss.margin: expected a number > 0 (δ in nats), got {self.margin}.")

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the mean over the pairs of the complete step, and no metrics.

        logps: [N] nats. The sequences of the batch alternate: better, worse.
        """
        summed = batch.sum_by_sequence(logps)
        return (self.margin - summed[0::2] + summed[1::2]).relu().sum() / (batch.global_sequences / 2), {}
