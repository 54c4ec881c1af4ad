"""Means with standard errors that are clustered by prompt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its standard error. It prints as "0.123 ± 0.045"; f"{estimate:.1f}" sets the digits."""

    mean: float
    """The mean; NaN if there are no values."""

    se: float | None = None
    """The standard error; None if it is unknown, as for a single prompt."""

    @classmethod
    def from_json(cls, value: Any) -> "Estimate":
        """Return the estimate in {"mean": …, "se" or "se_prompts": …} or in a number; NaN for None."""
        if not isinstance(value, Mapping):
            return cls(math.nan if value is None else float(value))
        mean, se = value["mean"], value.get("se", value.get("se_prompts"))
        return cls(math.nan if mean is None else float(mean), None if se is None else float(se))

    def to_json(self) -> dict[str, float | None]:
        """Return {"mean": …, "se": …}; JSON has no NaN, so the mean of no values is None."""
        return {"mean": None if math.isnan(self.mean) else self.mean, "se": self.se}

    def scale(self, factor: float) -> "Estimate":
        """Return the estimate in another unit, such as percent."""
        return Estimate(factor * self.mean, None if self.se is None else factor * self.se)

    def __format__(self, spec: str) -> str:
        if math.isnan(self.mean):
            return "–"
        return " ± ".join(format(value, spec or ".3f") for value in self if value is not None)

    def __str__(self) -> str:
        return format(self)


def fit_ols(y: np.ndarray, X: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit y [n] by least squares on X [n, k]; return coefficients [k] and their covariance, clustered (clusters [n]).

    The covariance is (XᵀX)⁻¹ Σ_g s_g s_gᵀ (XᵀX)⁻¹ with s_g = X_gᵀe_g, times G/(G−1) · (n−1)/(n−k). This is Liang and
    Zeger's sandwich with the small-sample factor of statsmodels and Stata (cov_type="cluster").
    """
    n, k = X.shape
    bread = np.linalg.inv(X.T @ X)
    coefficients = bread @ (X.T @ y)
    groups, index = np.unique(clusters, return_inverse=True)
    scores = np.zeros((len(groups), k))
    np.add.at(scores, index, X * (y - X @ coefficients)[:, None])
    small = len(groups) / (len(groups) - 1) * (n - 1) / (n - k)
    return coefficients, small * bread @ (scores.T @ scores) @ bread


def estimate_mean(values: np.ndarray, clusters: np.ndarray | Sequence[str] | None = None) -> Estimate:
    """Return the mean of `values` and its standard error, clustered by prompt.

    Without `clusters`, the rows of values [P, K], or the entries of [P], are the independent draws. The standard error
    is the standard deviation of the rows' means over √P.

    With `clusters`, which broadcast to the shape of `values`, clusters may have any sizes and values that are not
    finite are skipped. The standard error is √(G/(G−1) Σ_g (Σ_i∈g (v_i − v̄))²) / n. Both formulas agree for complete
    [P, K] values up to rounding.
    """
    if clusters is None:
        means = values.reshape(len(values), -1).mean(axis=1)
        se = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
        return Estimate(float(means.mean()), se)
    finite = np.isfinite(values)
    y, cluster = values[finite].astype(float), np.broadcast_to(np.asarray(clusters), values.shape)[finite]
    if len(y) == 0:
        return Estimate(math.nan)
    if len(np.unique(cluster)) < 2:
        return Estimate(float(y.mean()))
    _, covariance = fit_ols(y, np.ones((len(y), 1)), cluster)
    return Estimate(float(y.mean()), float(math.sqrt(covariance[0, 0])))


def estimate_by_prompt(values: np.ndarray) -> Estimate:
    """Return the mean of values [P, S], which may hold NaN, with the standard error clustered by prompt (row)."""
    return estimate_mean(values, np.arange(len(values))[:, None])
