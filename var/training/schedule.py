"""The learning rate over optimizer steps.

`transformers.get_scheduler` is not used: it has no floor for linear decay, and its warm-up starts at 0. The recorded
results need both a floor and a first step above 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, whose first step is above 0, then a constant rate or decay."""

    kind: Literal["cosine", "linear", "constant"]
    """The shape after the warm-up."""
    warmup: float
    """The fraction of all steps that warm up."""
    floor: float
    """The rate that the decay approaches, over the peak rate. kind=constant does not use it."""

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "constant"):
            raise UserError(f"optim.schedule.kind must be cosine, linear or constant, got {self.kind}")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise UserError("optim.schedule.warmup must be in [0, 1) and optim.schedule.floor in [0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """Return the rate over the peak rate at optimizer step 0..steps-1."""
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.kind == "constant":
            return 1.0
        done = (step - warm) / max(1, steps - warm)
        shape = 1 - done if self.kind == "linear" else 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
        return self.floor + (1 - self.floor) * shape
