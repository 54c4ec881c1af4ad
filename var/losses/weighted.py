"""Weighted SFT: a weight with each response, from the data. The base of SFT and VAR, whose weights come elsewhere."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from var.needs import Need
from var.packing import Packed
from var.problems import UserError

Normalize = Literal["token", "sequence"]


class Mean(NamedTuple):
    """A metric of this micro-batch as total and number, so that the mean over ranks and accumulation is exact."""

    total: Tensor
    number: Tensor | float


Metrics = dict[str, Mean]


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


def weighted_nll(logps: Tensor, weights: Tensor, batch: Packed, normalize: Normalize) -> tuple[Tensor, Metrics]:
    """Σ_i w_i Σ_t −log π_θ(y_it) over the step's response tokens, or over its sequences.

    logps [N] nats; weights [B], unitless, no gradient. The divisor is the whole optimiser step's, so micro-batches
    and ranks add up. Returns the scalar share of this micro-batch and its metrics.
    """
    divisor = batch.global_tokens if normalize == "token" else batch.global_sequences
    weighted = weights.detach().to(logps.dtype)[batch.sequence] * logps
    metrics = {
        "nll": Mean(-logps.detach().sum(), float(len(logps))),
        "weight/mean": Mean(weights.sum(), float(len(weights))),
        "weight/square": Mean(weights.square().sum(), float(len(weights))),
    }
    return -weighted.sum() / divisor, metrics


def check_normalize(normalize: str) -> None:
    if normalize not in ("token", "sequence"):
        raise UserError(f"loss.normalize is token or sequence, got {normalize}")
