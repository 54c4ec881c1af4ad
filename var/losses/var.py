"""VAR: SFT weighted by exp(r/λ) / Z(x) (Du et al., arXiv 2502.11026, Eq. 8 to 10).

Where we leave the paper: weights come from stored numbers, so that a step is an SFT step; they are divided by the
data set's mean weight, once; and Z has more estimators than the micro-batch (var/weights/estimators.py).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from var.losses.base import Metrics
from var.losses.common import Normalize, check_normalize, weighted_nll
from var.models.packing import Packed
from var.requirements import Need
from var.utils.errors import UserError
from var.weights.estimators import Estimator, normalize_log_weights
from var.weights.groups import within_prompt_std
from var.weights.table import Table


@dataclass(frozen=True, kw_only=True)
class VAR:
    """temperature: λ > 0; small trusts the reward, large tends to SFT. temperature_unit: `reward`, or `sd` for a
    multiple of the reward's standard deviation within a prompt. estimator: of Z. min_weight: rows whose weight is
    under it are left out and counted (they cost a whole step and train little); not with a planned estimator.
    """

    estimator: Estimator
    temperature: float = 1.0
    temperature_unit: Literal["reward", "sd"] = "reward"
    min_weight: float = 0.0
    normalize: Normalize = "token"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature is λ > 0, got {self.temperature}; for λ → ∞ use loss=sft")
        if self.temperature_unit not in ("reward", "sd"):
            raise UserError(f"loss.temperature_unit is reward or sd, got {self.temperature_unit}")
        if self.min_weight < 0 or (self.min_weight and self.estimator.planned):
            raise UserError("loss.min_weight is ≥ 0, and 0 with an in-batch estimator, whose micro-batches are fixed")
        check_normalize(self.normalize)

    @property
    def needs(self) -> frozenset[Need]:
        return self.estimator.needs

    def weights(self, table: Table) -> Tensor:
        """[n] float64 of mean 1 over the rows that train; 0 for those left out."""
        log_weights = normalize_log_weights(self.estimator(table, self.scaled_temperature(table)))
        weights = log_weights.exp()
        small = (weights < self.min_weight) | ((weights == 0) & (log_weights > -torch.inf))
        if small.any() and not self.estimator.planned:  # a weight too small for a float trains no more than a 0
            weights = normalize_log_weights(weights.masked_fill(small, 0.0).log()).exp()
        return weights

    def scaled_temperature(self, table: Table) -> float:
        """λ in reward units."""
        if self.temperature_unit == "reward":
            return self.temperature
        sigma = within_prompt_std(table.rewards, table.group)
        if not sigma:
            raise UserError(
                "loss.temperature_unit=sd needs prompts whose responses differ in reward, and here none do: take "
                "several responses a prompt (data.responses=both or all, generate.responses), other prompts or another "
                "reward, or set loss.temperature_unit=reward"
            )
        return self.temperature * sigma

    def __call__(self, logps: Tensor, batch: Packed) -> tuple[Tensor, Metrics]:
        """logps: [N] nats, log π_θ of each response token. Returns a scalar and this micro-batch's metrics."""
        assert batch.weights is not None
        return weighted_nll(logps, batch.weights, batch, self.normalize)
