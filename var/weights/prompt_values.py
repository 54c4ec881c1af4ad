"""V(x): a cross-fitted regression of the reward on the prompt."""

import numpy as np
import torch
from torch import Tensor

from var.weights.table import Table


def prompt_values(table: Table, folds: int = 10) -> Tensor:
    """[G]: V(x), ridge regression of a prompt's mean reward on its features, cross-fitted: each prompt's value comes
    from the other folds, since fitted on the row itself it would eat the weight.

    The penalty is chosen in each fold by generalised cross-validation. With fewer than 20 prompts V is the mean of
    the others. Groups without a sequence (held out) get a value too, and are not fitted on.
    """
    assert table.features is not None
    count = torch.bincount(table.group, minlength=len(table.features)).double()
    target = torch.zeros(len(count), dtype=torch.float64).index_add(0, table.group, table.rewards) / count.clamp(min=1)
    known = np.flatnonzero(count.numpy())
    x, y = table.features.double().numpy(), target.numpy()
    values = np.full(len(y), y[known].mean() if len(known) else 0.0)
    if len(known) < 20:
        total, n = y[known].sum(), len(known)
        values[known] = (total - y[known]) / (n - 1) if n > 1 else 0.0
        return torch.from_numpy(values)
    fold = np.random.default_rng(0).permutation(len(known)) % folds
    for f in range(folds):
        fit, rest = known[fold != f], known[fold == f]
        values[rest] = _ridge(x[fit], y[fit], x[rest])
    return torch.from_numpy(values)


def _ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Predictions for `new` by ridge regression on standardised features; the penalty minimises the GCV score."""
    centre, scale, mean = x.mean(0), x.std(0) + 1e-12, y.mean()
    x, new = (x - centre) / scale, (new - centre) / scale
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    projected = u.T @ (y - mean)
    best, chosen = np.inf, np.inf
    for penalty in s[0] ** 2 * np.logspace(-6, 2, 25):
        shrink = s**2 / (s**2 + penalty)
        residual = (y - mean) - u @ (shrink * projected)
        score = (residual @ residual) / (len(y) - 1 - shrink.sum()) ** 2
        if score < best:
            best, chosen = score, penalty
    return mean + new @ (vt.T @ (s / (s**2 + chosen) * projected))
