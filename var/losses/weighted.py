"""Weighted SFT: a weight with each response, from the data. The base of SFT and VAR, whose weights come elsewhere."""

from dataclasses import dataclass

from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, weighted_nll
from var.models.packing import Packed
from var.requirements import Need


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """The weight column of the data; a weight of 1 is SFT.

    normalize: `token` divides by the response tokens of the whole optimiser step, `sequence` by its sequences.
    """

    normalize: Normalize = "token"

    def __post_init__(self) -> None:
        check_normalize(self.normalize)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.WEIGHT_COLUMN})

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Returns a scalar and this micro-batch's metrics."""
        assert batch.weights is not None
        return weighted_nll(logps, batch.weights, batch, self.normalize)
