"""Means with standard errors clustered by prompt."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def clustered_ols(y: np.ndarray, X: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of y [n] on X [n, k], and the coefficients' covariance [k, k] with errors clustered (cluster [n]).

    (XᵀX)⁻¹ Σ_g s_g s_gᵀ (XᵀX)⁻¹ with s_g = X_gᵀe_g, times G/(G−1) · (n−1)/(n−k): Liang and Zeger's sandwich with
    the small-sample factor that statsmodels and Stata use (cov_type="cluster").
    """
    n, k = X.shape
    bread = np.linalg.inv(X.T @ X)
    coefficients = bread @ (X.T @ y)
    groups, index = np.unique(cluster, return_inverse=True)
    scores = np.zeros((len(groups), k))
    np.add.at(scores, index, X * (y - X @ coefficients)[:, None])
    small = len(groups) / (len(groups) - 1) * (n - 1) / (n - k)
    return coefficients, small * bread @ (scores.T @ scores) @ bread


def clustered_error(values: np.ndarray, clusters: np.ndarray | Sequence[str]) -> float | None:
    """Standard error of the mean of [n] values, clusters [n] of any sizes: √(G/(G−1) Σ_g (Σ_i∈g (v_i − v̄))²) / n."""
    cluster = np.asarray(clusters)
    if len(np.unique(cluster)) < 2:
        return None
    _, covariance = clustered_ols(values, np.ones((len(values), 1)), cluster)
    return float(math.sqrt(covariance[0, 0]))


class Estimate(NamedTuple):
    """A mean over responses and its standard error, clustered by prompt; None of a single prompt."""

    mean: float
    se: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.se is None else f" ± {self.se:.3f}")


def clustered(values: np.ndarray) -> Estimate:
    """Mean of [P, K] values; the prompts' means are the independent draws."""
    means = values.mean(axis=1)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None)
