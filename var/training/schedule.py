"""The learning rate over optimizer steps."""

from dataclasses import dataclass
from typing import Literal

import torch

from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over optimiser steps. warmup: share of all steps, from 0; then `kind`, down to `floor` times
    the peak."""

    kind: Literal["cosine", "linear", "constant"]
    warmup: float
    floor: float

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "constant"):
            raise UserError(f"optim.schedule.kind is cosine, linear or constant, got {self.kind}")
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise UserError("optim.schedule.warmup lies in [0, 1) and floor in [0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """Of the peak rate, at optimiser step 0..steps-1."""
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        if self.kind == "constant":
            return 1.0
        done = (step - warm) / max(1, steps - warm)
        shape = 1 - done if self.kind == "linear" else 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
        return self.floor + (1 - self.floor) * shape
