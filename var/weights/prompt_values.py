"""V(x): a cross-fitted regression of the reward on the prompt."""

import numpy as np
import torch
from torch import Tensor

from var.weights.inputs import WeightInputs


def prompt_values(inputs: WeightInputs, folds: int = 10) -> Tensor:
    """Return [G] V(x) by ridge regression of a prompt's mean reward on its features.

    The value of a prompt comes from a fit on the other folds. Fitted on the prompt itself, it would remove the signal
    from the weight. The penalty is chosen in each fold by generalized cross-validation. With fewer than 20 prompts, V
    is the mean reward of the other prompts. Prompts without a sequence get a value and are not fitted on.
    """
    features = inputs.get("features")
    count = torch.bincount(inputs.group, minlength=len(features)).double()
    total = torch.zeros(len(count), dtype=torch.float64).index_add(0, inputs.group, inputs.rewards)
    x, y = features.double().numpy(), (total / count.clamp(min=1)).numpy()
    present = np.flatnonzero(count.numpy())
    values = np.full(len(y), y[present].mean() if len(present) else 0.0)
    if len(present) < 20:
        n = len(present)
        values[present] = (y[present].sum() - y[present]) / (n - 1) if n > 1 else 0.0
        return torch.from_numpy(values)
    fold = np.random.default_rng(0).permutation(len(present)) % folds
    for f in range(folds):
        fit, rest = present[fold != f], present[fold == f]
        values[rest] = _ridge(x[fit], y[fit], x[rest])
    return torch.from_numpy(values)


def _ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return predictions for `new` by ridge regression. The penalty has the least GCV score."""
    center, scale, mean = x.mean(0), x.std(0) + 1e-12, y.mean()
    x, new = (x - center) / scale, (new - center) / scale
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
