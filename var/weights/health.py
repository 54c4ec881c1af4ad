"""Health of the weights: effective sample size and extremes."""

from typing import NamedTuple

from torch import Tensor


class Health(NamedTuple):
    """Of n weights: ess, effective sample size over n; largest, over the mean; tiny, share under 1e-3 of the mean;
    length_correlation, Pearson's, of weight with response length."""

    ess: float
    largest: float
    tiny: float
    length_correlation: float


def health(weights: Tensor, length: Tensor) -> Health:
    """Of weights [n] and response lengths [n]; see Health."""
    mean = weights.mean()
    centred, lengths = weights - mean, length.double() - length.double().mean()
    spread = (centred.square().sum() * lengths.square().sum()).sqrt()
    return Health(
        ess=float(weights.sum() ** 2 / weights.square().sum() / len(weights)),
        largest=float(weights.max() / mean),
        tiny=float((weights < 1e-3 * mean).double().mean()),
        length_correlation=float((centred * lengths).sum() / spread) if spread > 0 else 0.0,
    )
