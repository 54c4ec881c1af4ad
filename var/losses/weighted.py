"""Weighted SFT: the data carries a weight for each response. A weight of 1 is SFT."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, weighted_nll
from var.models.packing import Packed
from var.requirements import Requirement, WeightColumn


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Negative log-likelihood of the responses, weighted by the data."""

    normalize: Normalize = "token"
    """`token` divides by the response tokens of the optimizer step, `sequence` by its sequences."""

    requires: ClassVar[tuple[Requirement, ...]] = (WeightColumn(),)

    def __post_init__(self) -> None:
        check_normalize(self.normalize)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the loss of this micro-batch and its metrics."""
        assert batch.weights is not None
        return weighted_nll(logps, batch.weights, batch, self.normalize)
