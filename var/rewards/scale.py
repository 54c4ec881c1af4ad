"""The reward scale of a run. The annotation cache holds raw rewards; λ is relative to the scaled ones."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Map raw rewards r to r (raw), 1/(1 + e^−r) (sigmoid), or (r − mean)/sd (zscore)."""

    kind: Literal["raw", "sigmoid", "zscore"] = "raw"
    mean: float = 0.0  # of the training responses, for zscore
    sd: float = 1.0  # of the training responses, for zscore

    def __post_init__(self) -> None:
        if self.kind not in ("raw", "sigmoid", "zscore"):
            raise UserError(f"reward_scale: expected raw, sigmoid or zscore, got {self.kind}")

    def fit(self, rewards: np.ndarray) -> "Scale":
        """Return the scale with the moments of these raw rewards, if it is a zscore."""
        if self.kind != "zscore":
            return self
        if rewards.max() == rewards.min():
            raise UserError("reward_scale=zscore: all rewards are equal. Use reward_scale=raw")
        return replace(self, mean=float(rewards.mean()), sd=float(rewards.std()))

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        """Return scaled rewards."""
        if self.kind == "sigmoid":
            return np.exp(-np.logaddexp(0, -rewards))
        return (rewards - self.mean) / self.sd if self.kind == "zscore" else rewards

    def describe(self) -> str:
        """Return the scale and its moments as text."""
        return f"zscore(mean={self.mean:.4g}, sd={self.sd:.4g})" if self.kind == "zscore" else self.kind
