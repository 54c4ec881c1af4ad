"""The scale of the reward in a run: what is stored is raw, λ has its meaning on this scale."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """raw: as it is. sigmoid: 1/(1 + e^−r). zscore: (r − mean)/sd with the moments of the training responses."""

    kind: Literal["raw", "sigmoid", "zscore"] = "raw"
    mean: float = 0.0
    sd: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("raw", "sigmoid", "zscore"):
            raise UserError(f"reward_scale is raw, sigmoid or zscore, got {self.kind}")

    def fitted(self, rewards: np.ndarray) -> "Scale":
        """With the moments of these raw rewards, where the scale needs them."""
        if self.kind != "zscore":
            return self
        if rewards.max() == rewards.min():
            raise UserError("reward_scale=zscore, but every reward is the same")
        return replace(self, mean=float(rewards.mean()), sd=float(rewards.std()))

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        if self.kind == "sigmoid":
            return np.exp(-np.logaddexp(0, -rewards))
        return (rewards - self.mean) / self.sd if self.kind == "zscore" else rewards

    def describe(self) -> str:
        return f"zscore(mean={self.mean:.4g}, sd={self.sd:.4g})" if self.kind == "zscore" else self.kind
