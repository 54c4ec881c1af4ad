"""SFT: the mean negative log-likelihood of the responses. It is the control of every reward-weighted loss."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, weighted_nll
from var.models.packing import Packed
from var.requirements import Requirement


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Negative log-likelihood of the responses."""

    normalize: Normalize = "token"
    """`token` divides by the response tokens of the optimizer step, `sequence` by its sequences."""

    requires: ClassVar[tuple[Requirement, ...]] = ()

    def __post_init__(self) -> None:
        check_normalize(self.normalize)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss of this micro-batch and its metrics."""
        return weighted_nll(logps, logps.new_ones(len(batch)), batch, self.normalize)
