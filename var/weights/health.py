"""The health of weights: effective sample size, extremes, and correlation with response length."""

from typing import NamedTuple

from torch import Tensor


class WeightHealth(NamedTuple):
    """Statistics of n weights."""

    ess: float
    """Effective sample size (Σw)² / Σw², divided by n."""
    largest: float
    """The largest weight over the mean weight."""
    tiny: float
    """The fraction of weights below 1e-3 of the mean weight."""
    length_correlation: float
    """Pearson correlation of the weight with the response length."""


def weight_health(weights: Tensor, length: Tensor) -> WeightHealth:
    """Return the statistics of weights [n] of responses with lengths [n] in tokens."""
    mean = weights.mean()
    centered, lengths = weights - mean, length.double() - length.double().mean()
    spread = (centered.square().sum() * lengths.square().sum()).sqrt()
    return WeightHealth(
        ess=float(weights.sum() ** 2 / weights.square().sum() / len(weights)),
        largest=float(weights.max() / mean),
        tiny=float((weights < 1e-3 * mean).double().mean()),
        length_correlation=float((centered * lengths).sum() / spread) if spread > 0 else 0.0,
    )
