"""A custom loss with a requirement of its own: SFT that prefers short responses to each prompt.

The requirement is a dataclass with its parameters. It names its provider, which computes it from the encoded responses
and returns it under a name. The loss finds it in `batch.extra`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var.annotate.base import Provider, TrainingSet
from var.losses.base import Metrics
from var.losses.common import weighted_nll
from var.models.packing import Packed
from var.requirements import Requirement
from var.utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RelativeLength(Requirement):
    """Response tokens over the mean of the prompt's responses, at most `limit`."""

    limit: float = math.inf
    """The largest value."""

    provider = "length_penalty.ProvideRelativeLength"
    shape = "[B]"
    text = "response tokens over the mean of the prompt's responses"


class ProvideRelativeLength(Provider[RelativeLength]):
    """Provides the relative length of each response."""

    def select(self, data: TrainingSet) -> None:
        """Compute it for all n sequences, before the plan."""
        length, group = torch.from_numpy(data.sequences.length).double(), torch.from_numpy(data.sequences.group)
        mean = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, length) / group.bincount()
        self.lengths = (length / mean[group]).clamp(max=self.requirement.limit)

    def batch_fields(self, data: TrainingSet, micro_batch: int, members: np.ndarray) -> dict[str, Any]:
        """Return it for the micro-batch, [B]."""
        return {"relative_length": self.lengths[members].float()}


@dataclass(frozen=True, kw_only=True)
class LengthPenalty:
    """SFT with the weight e^{α(1 − relative length)} per response."""

    alpha: float = 1.0
    """α ≥ 0; 0 is SFT."""
    limit: float = 2.0
    """Relative lengths above it count as it."""

    def __post_init__(self) -> None:
        if not self.alpha >= 0 or not self.limit > 0:
            raise UserError("loss.alpha must be at least 0 and loss.limit above 0")

    @property
    def requires(self) -> tuple[Requirement, ...]:
        """The relative length of each response."""
        return (RelativeLength(limit=self.limit),)

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """Return the weighted NLL over the step's response tokens, and its metrics."""
        weights = (self.alpha * (1 - batch.extra["relative_length"])).exp()
        return weighted_nll(logps, weights, batch, "token")
